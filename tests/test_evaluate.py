"""Scores and intervals against formulas written out, tables, simulation, and PyTorch's and Transformers' losses."""

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

import narrowcast
from models import random_ids, save_random
from narrowcast import InvalidInputError, PeerLostError, Plan
from narrowcast.cli.verdicts import tell
from narrowcast.codecs import FeatureCodec, FeatureRecipe
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate, reference, site_errors
from narrowcast.evaluation import ranks as on_ranks
from narrowcast.evaluation.continuations import continuations
from narrowcast.evaluation.ranks import Job, Outcome
from narrowcast.plan.split import Split
from narrowcast.progress import Progress, heard_by
from narrowcast.runtime.reports import Report
from narrowcast.scores import Items, Score, compare, log_probs
from narrowcast.scores.intervals import holm, t_quantile, t_within
from narrowcast.scores.verdict import in_words
from ranks import Ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_engine().load(save_random("llama", tmp_path_factory.mktemp("model"), torch.float32))


def test_scores_written_out() -> None:
    """Two tokens, a vocabulary of two: KL, agreement and perplexity by hand."""
    reference = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    found = torch.tensor([[[0.25, 0.75], [0.8, 0.2]]]).log()
    score = compare([reference], [found], [torch.tensor([[0, 1]])])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    assert score.kl_nats == pytest.approx((first + second) / 2, abs=1e-6)
    assert score.top1_agreement == 0.5  # argmax of a tie is the first
    assert score.perplexity == pytest.approx(1 / 0.75, rel=1e-6)  # token 1 is predicted with 0.75
    assert score.num_tokens == 2
    assert score.perplexity_change == pytest.approx(0.5 / 0.75 - 1, rel=1e-6)  # the reference gave it 0.5
    assert score.kl_percentiles["50"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert score.kl_percentiles["100"] == pytest.approx(first, rel=1e-6)
    assert set(score.intervals.values()) == {None}  # of a single sequence nothing can be told


def test_top5_agreement_asks_where_the_model_ranks_the_first_choice_of_the_reference() -> None:
    """The reference says 0; the model ranks that fifth, sixth, and fifth together with others as likely."""
    reference = torch.tensor([9.0, 1, 1, 1, 1, 1, 1]).log_softmax(0).expand(1, 3, 7)
    logits = torch.tensor([[3.0, 7, 6, 5, 4, 2, 1], [2, 7, 6, 5, 4, 3, 1], [3, 7, 6, 5, 4, 3, 3]])
    score = compare([reference], [logits.log_softmax(-1)[None]], [torch.zeros(1, 3, dtype=torch.long)])
    assert score.top5_agreement == pytest.approx(2 / 3)
    assert score.top1_agreement == 0


def test_figures_do_not_depend_on_how_sequences_are_batched() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, found = (torch.randn(4, 9, 11, generator=generator).log_softmax(-1) for _ in range(2))
    ids = torch.randint(0, 11, (4, 9), generator=generator)
    whole, single = (compare(reference.split(size), found.split(size), ids.split(size)) for size in (4, 1))
    assert whole.by_sequence == single.by_sequence and whole.intervals == single.intervals
    assert (whole.kl_by_token == single.kl_by_token).all() and len(whole.kl_by_token) == 36


def test_scores_of_a_model_agree_with_other_implementations(model: nn.Module) -> None:
    batches = [random_ids(2, 20), random_ids(1, 9, seed=1)]
    reference = [log_probs(model, ids) for ids in batches]
    plan = narrowcast.calibrate(model, batches, tp_size=2, codec="feature(bits=3)")
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True):
        score = compare(reference, [log_probs(model, ids) for ids in batches], batches)
        found = [model(ids).logits for ids in batches]
        losses = [model(ids, labels=ids).loss.item() * ids[:, 1:].numel() for ids in batches]
    kl = sum(
        functional.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True).item()
        for logits, expected in zip(found, reference, strict=True)
    )
    assert score.kl_nats == pytest.approx(kl / 49, rel=1e-4)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / (38 + 8)), rel=1e-5)
    assert 0 < score.top1_agreement < 1


def test_a_model_scores_zero_against_itself(model: nn.Module) -> None:
    batches = [random_ids(2, 20)]
    score = compare(*[[log_probs(model, ids) for ids in batches] for _ in range(2)], batches)
    assert score.kl_nats == pytest.approx(0, abs=1e-9)
    assert score.top1_agreement == 1


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_student_t_is_that_of_the_tables(degrees: int, t: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(t, abs=6e-4)
    assert t_within(t_quantile(0.99, degrees), degrees) == pytest.approx(0.99, abs=1e-12)


def test_student_t_ends_at_the_normal_distribution() -> None:
    """Its density has a relative term of (z**4 - 2 z**2 - 1) / (4 degrees): below 3e-4 at 10000."""
    assert t_quantile(0.95, 10_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), rel=3e-4)


def test_a_mean_over_equal_sequences_has_the_usual_standard_error() -> None:
    values = 1.0, 2.0, 4.0, 5.0
    items = Items(values=values, weights=(7,) * 4)
    assert items.mean == 3
    assert items.standard_error == pytest.approx(statistics.stdev(values) / 2)
    low, high = items.interval() or (0, 0)
    assert (high - low) / 2 == pytest.approx(3.182 * statistics.stdev(values) / 2, rel=1e-3)


def test_a_mean_over_unequal_sequences_has_the_standard_error_of_a_ratio() -> None:
    """By hand: mean 1, residuals 30 * -1 and 10 * 3 over the mean weight of 20, so 1.5 each."""
    items = Items(values=(0.0, 4.0), weights=(30, 10))
    assert items.mean == 1
    assert items.standard_error == pytest.approx(math.sqrt((1.5**2 + 1.5**2) / 1 / 2))


def test_intervals_hold_what_they_promise() -> None:
    """Of 1000 texts of 12 sequences of 50 to 150 tokens, about 95 % of intervals hold the true mean: 3 sigma is 2 %."""
    source = random.Random(0)
    held = 0
    for _ in range(1000):
        weights = [source.randint(50, 150) for _ in range(12)]
        values = [source.gauss(1, 1) for _ in weights]
        low, high = Items(values=tuple(values), weights=tuple(weights)).interval() or (0, 0)
        held += low <= 1 <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_pairs_tell_what_single_means_cannot() -> None:
    """Sequences differ by far more than the models do; the model is worse by 0.01 at every one."""
    base = Items(values=(1.0, 3.0, 5.0, 9.0), weights=(10,) * 4)
    worse = Items(values=(1.011, 3.01, 5.009, 9.01), weights=(10,) * 4)
    low, high = (worse - base).interval() or (0, 0)
    assert 0.008 < low < 0.01 < high < 0.012
    assert (worse - base).p_above_zero() < 1e-3 < 0.999 < (base - worse).p_above_zero()
    assert worse.interval() and worse.interval()[0] < base.mean


def test_p_values_of_what_does_not_vary() -> None:
    for values, p in (((0.0, 0.0), 1), ((0.1, 0.1), 0), ((-0.1, -0.1), 1), ((0.5,), 1)):
        assert Items(values=values, weights=(1,) * len(values)).p_above_zero() == p


def test_holm_by_hand() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "b": 0.03, "c": 0.06, "a": 0.06}
    )
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1, "b": 1}


def scored(model: nn.Module, plan: Plan, batches: Sequence[Tensor]) -> tuple[Score, Report]:
    found = evaluate(model, plan, batches)
    return found.score, found.report


def test_a_plan_of_some_sites_sends_the_others_as_they_are(model: nn.Module) -> None:
    """Without any site the split alone is left, which in FP32 rounds otherwise than the whole model and no more."""
    batches = [random_ids(1, 24)]
    plan = narrowcast.calibrate(model, batches, tp_size=2, codec="feature(bits=3)")
    nothing, _ = scored(model, plan.only(()), batches)
    assert abs(nothing.kl_nats) < 1e-7 < 1e-5 < scored(model, plan, batches)[0].kl_nats
    everything, report = scored(model, plan.only(plan.sites), batches)
    assert everything.by_sequence == scored(model, plan, batches)[0].by_sequence
    first = next(iter(plan.sites))
    _, only_first = scored(model, plan.only([first]), batches)
    assert only_first.sites[first] == report.sites[first]  # nothing before it differs


def test_errors_by_site_find_the_site_that_is_coded_badly(model: nn.Module) -> None:
    """All sites in 8 bits but one, in 2; and what they add is nearly what all of them together do."""
    batches = [random_ids(1, 24, seed=seed) for seed in range(3)]
    fine, coarse = (
        narrowcast.calibrate(model, batches, tp_size=2, codec={"sum": codec, "last": codec})
        for codec in ("group(bits=8, size=32)", "group(bits=2, size=32)")
    )
    bad = "model.layers.1.mlp.down_proj"
    plan = replace(fine, sites={**fine.sites, bad: coarse.sites[bad]})
    reference = [log_probs(model, ids) for ids in batches]
    found = {each.site: each for each in site_errors(model, plan, batches, reference)}
    assert found.keys() == plan.sites.keys()
    worst = found.pop(bad).added_kl_nats
    assert len(worst.values) == 3
    assert all(each.added_kl_nats.mean < worst.mean / 100 for each in found.values())
    together = evaluate(model, plan, batches, reference=reference).score.kl_nats
    assert worst.mean + sum(each.added_kl_nats.mean for each in found.values()) == pytest.approx(together, rel=0.2)


@pytest.mark.parametrize("num_outliers", [0, 1])
def test_reports_count_clipping_by_site(model: nn.Module, num_outliers: int) -> None:
    """A site's scales a hundred times too small: all but zeros of both ranks' values are clipped there, or guarded."""
    batches = [random_ids(1, 24)]
    plan = narrowcast.calibrate(model, batches, tp_size=2, codec=FeatureRecipe(num_bits=8, num_outliers=num_outliers))
    name = list(plan.sites)[1]
    codec = plan.sites[name].codecs[0]
    assert isinstance(codec, FeatureCodec)
    tight = replace(codec, scale=codec.scale / 128 / 128)
    site = replace(plan.sites[name], codecs=(tight, *plan.sites[name].codecs[1:]))
    with narrowcast.attach(
        model, replace(plan, sites={**plan.sites, name: site}), simulate=True, algorithm="one_shot"
    ) as handle:
        log_probs(model, batches[0])
    report = handle.report()
    counted = "num_guarded" if num_outliers else "num_saturated"  # without an outlier there is no place for the mark
    most = 2 * 24 * (1 if num_outliers else 96)
    by_site = {name: getattr(each, counted) for name, each in report.sites.items() if each.coded}
    assert sum(by_site.values()) == getattr(report, counted) == report.to_json()[counted]
    assert 0.9 * most < by_site.pop(name) <= most
    assert max(by_site.values()) < most / 4
    assert Report.from_json(report.to_json()) == report


def test_plans_stand_by_and_take_turns(model: nn.Module) -> None:
    """The same bits as with each attached alone; the model's own between them; one at most is at work."""
    ids, names = random_ids(2, 20), ("int4-feature", "int8-feature")
    plans = [narrowcast.calibrate(model, [ids], tp_size=2, codec=name) for name in names]
    own, alone = log_probs(model, ids), []
    for plan in plans:
        with narrowcast.attach(model, plan, simulate=True) as handle:
            alone.append((log_probs(model, ids), handle.report()))
    handles = []
    for plan in plans:
        handles.append(narrowcast.attach(model, plan, simulate=True))
        handles[-1].suspend()
        handles[-1].suspend()  # nothing more happens
    for handle, (expected, _) in zip(handles, alone, strict=True):
        handle.resume()
        with pytest.raises(InvalidInputError, match="a model without a plan"):
            handles[0].resume()
        assert torch.equal(log_probs(model, ids), expected)
        handle.suspend()
        assert torch.equal(log_probs(model, ids), own)
    assert [handle.report() for handle in handles] == [report for _, report in alone]
    handles[0].resume()
    handles[1].remove()  # the other one stays at work
    assert torch.equal(log_probs(model, ids), alone[0][0])
    handles[0].remove()
    assert torch.equal(log_probs(model, ids), own) and "forward" not in vars(model.model.layers[0].mlp.down_proj)
    with pytest.raises(InvalidInputError, match="found one that was removed"):
        handles[0].resume()


def test_nothing_of_a_batch_outlives_it(model: nn.Module) -> None:
    """When a batch is asked for, no log-probabilities of the one before are left: a model of V = 101, and no others."""
    plan = narrowcast.calibrate(model, [random_ids(1, 24)], tp_size=2, codec="int4-feature")
    alive = []

    def watch(said: object) -> None:
        if isinstance(said, Progress) and said.doing == "scoring":
            gc.collect()
            alive.append(sum(type(each) is Tensor and each.shape == (1, 24, 101) for each in gc.get_objects()))

    with heard_by(watch):
        evaluate(model, plan, [random_ids(1, 24, seed=seed) for seed in range(4)])
    assert max(alive) <= 2  # those of the batch before, until the loop takes the next


def test_without_text_nothing_is_scored(model: nn.Module) -> None:
    plan = narrowcast.calibrate(model, [random_ids(1, 24)], tp_size=2, codec="int4-feature")
    with pytest.raises(InvalidInputError, match="batches: expected one or more"):
        evaluate(model, plan, [])


# On ranks


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    model = load_engine().load(save_random("llama", folder / "model", torch.float32))
    batches = [random_ids(2, 20), random_ids(1, 9, seed=1)]
    plans = [folder / name for name in ("feature(bits=3)", "int8-feature")]
    for path in plans:
        narrowcast.calibrate(model, batches, tp_size=2, codec=path.name).save(path)
    return Job(model=str(folder / "model"), plans=plans, batches=batches)


def outcomes(job: Job, share: float, delay_s: float = 0.0) -> list[Outcome]:
    """The outcomes on this rank, if that share of memory is free and the first rank's model takes so long."""

    def slow(model: nn.Module, ids: Tensor) -> Tensor:
        time.sleep(delay_s)
        return log_probs(model, ids)

    reference.SHARE, reference.log_probs = share, slow  # type: ignore[assignment]
    return on_ranks._on_rank(job, Split(tp_size=2))


@pytest.mark.parametrize(("share", "kind"), [(0.8, "whole"), (0.0, "split")])
def test_ranks_score_several_plans_beside_the_uncompressed_model(
    ranks: Callable[[int], Ranks], job: Job, share: float, kind: str
) -> None:
    """Whole where it fits, otherwise split, which in FP32 rounds otherwise and no more."""
    first, second = ranks(2).run(outcomes, job, share)
    model = load_engine().load(job.model)
    for path, outcome, other in zip(job.plans, first, second, strict=True):
        found = evaluate(model, Plan.load(path), job.batches)
        assert outcome.reference == other.reference == kind
        assert outcome.score is not None and other.score is None
        assert outcome.score.kl_nats == pytest.approx(found.score.kl_nats, rel=1e-2)  # values may round otherwise
        assert outcome.score.perplexity == pytest.approx(found.score.perplexity, rel=1e-5)
        assert outcome.report == other.report == found.report


def test_ranks_wait_for_the_first_ones_model_longer_than_for_a_lost_rank(
    ranks: Callable[[int], Ranks], job: Job
) -> None:
    (outcome, *_), _ = ranks(2).run(outcomes, replace(job, timeout_s=1.0), 0.8, 3.0)
    assert outcome.score is not None


def lost(job: Job) -> tuple[int, ...] | None:
    """The ranks that this one lost, the first having died while its model computes."""
    reference.log_probs = lambda model, ids: os._exit(1)  # type: ignore[assignment]
    reference.SHARE = 0.8
    try:
        on_ranks._on_rank(job, Split(tp_size=2))
    except PeerLostError as error:
        return error.ranks
    return None


def test_who_waits_for_the_first_ranks_model_notices_that_it_died(ranks: Callable[[int], Ranks], job: Job) -> None:
    pool, start = ranks(2), time.monotonic()
    pool.start(lost, job)
    assert pool.result(1) == (0,)
    assert time.monotonic() - start < 60
    pool.close()


# Verdicts


@pytest.mark.parametrize(
    ("kl_nats", "word"),
    [
        (0.0, "none noticed"),
        (0.01, "none noticed"),
        (0.011, "slight"),
        (0.05, "slight"),
        (0.051, "visible"),
        (0.4, "visible"),
        (0.41, "unusable"),
        (float("inf"), "unusable"),
        (float("nan"), "unusable"),
    ],
)
def test_verdicts_in_words(kl_nats: float, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From visible on there is something to try; what is unusable ends with status 1."""
    assert in_words(kl_nats) == word
    with pytest.raises(typer.Exit) if word == "unusable" else nullcontext():
        tell(kl_nats, "on this text")
    shown = capsys.readouterr().out
    assert shown.startswith(f"verdict: {word}; KL {kl_nats:.3g} nats from the uncompressed model, on this text\n")
    assert ("to try: " in shown) == (word in ("visible", "unusable"))


def test_both_models_continue_the_text(model: nn.Module) -> None:
    batches = [random_ids(2, 30)]
    plan = narrowcast.calibrate(model, batches, tp_size=2, codec="bf16")
    found = evaluate(model, plan, batches)
    assert found.continued.prompt == batches[0][0, :24].tolist()
    said = continuations(model, [batches[0][:1, :24]], 10)[0]
    assert found.continued.uncompressed == said and len(said) <= 10
    assert found.to_json()["verdict"] == "none noticed"
    assert found.to_json()["continued"]["coded"] == found.continued.coded
    name, value, uncompressed, _ = found.figures()[3]
    assert (name, uncompressed) == ("perplexity", f"{found.score.reference_perplexity:.4f}")
    assert float(value) == pytest.approx(found.score.reference_perplexity, rel=0.01)
