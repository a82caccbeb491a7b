"""Sampled sums: what a site loses, measured as it serves, is what its codecs lose, and sampling changes no bit."""

import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from conftest import MODEL
from models import calibrated, random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.collectives import simulate
from narrowcast.engines import load_engine
from narrowcast.plan.chains import Chains, Reader
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.planned import PlannedWires
from narrowcast.runtime.reports import Report, SiteReport
from narrowcast.runtime.sampling import (
    MAX_TOKENS,
    Histogram,
    Samples,
    check_sampling,
    offset,
    sampled,
)
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.transport import TcpTransport
from ranks import Ranks
from transports import needs_mesh

Pools = Callable[[int], Ranks]
CPU, E, SITES = torch.device("cpu"), 128, ("a", "b")


def values(seed: int, num_tokens: int, world_size: int = 2) -> Tensor:
    return torch.randn(world_size, num_tokens, E, generator=torch.Generator().manual_seed(seed))


def sites(every: int, *, fed_back: bool = False, read: bool = False, algorithm: str = "one_shot") -> Sites:
    codecs = calibrated("int4-feature", values(99, 200))
    chains = Chains()
    if fed_back:
        readers = {"norm": Reader(after="a", modules=("up",), scale=1.0)} if read else {}
        chains = Chains(chains=(SITES,), readers=readers, unread="" if read else "nobody reads")
    expected = {site: {"one_shot": 0.1, "two_shot": 0.1} for site in SITES}
    kinds = dict.fromkeys(SITES, "sum")
    options = {"chains": chains, "expected": expected, "kinds": kinds, "sample_every": every}
    return Sites(dict.fromkeys(SITES, codecs), (), algorithm, CPU, **options)  # type: ignore[arg-type]


def forward(wires: PlannedWires, given: list[Tensor]) -> list[Tensor]:
    """The sums of both sites; each rank reads its own view of the stream in between."""
    found = []
    for site, x in zip(SITES, given, strict=True):
        residue = wires.residue(site, x.shape[-2], E, CPU)
        partials = list(x) if x.dim() == 3 else [x]
        found.append(wires.sum(partials, site, residue))
        if wires.feedback.readers and site == "a":
            wires.keep("norm", found[-1], torch.clone)
    return found


def simulated(found: Sites, num_tokens: int, times: int) -> list[Tensor]:
    wires = Simulator(found, 2)
    return [
        y for time in range(times) for y in forward(wires, [values(time, num_tokens), values(50 + time, num_tokens)])
    ]


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_the_error_of_sampled_sums_is_that_of_all_their_tokens(algorithm: str) -> None:
    found = sites(1, algorithm=algorithm)
    simulated(found, MAX_TOKENS, 3)
    samples = found.report().sites["a"].samples
    assert samples is not None and samples.times == 3 and samples.expected == pytest.approx(0.1)
    noise = power = 0.0
    for time in range(3):
        x_RTE = values(time, MAX_TOKENS)
        coded = simulate.all_reduce(list(x_RTE), codec=calibrated("int4-feature", values(99, 200)), algorithm=algorithm)
        noise += (coded - x_RTE.sum(0)).square().sum().item()
        power += x_RTE.sum(0).square().sum().item()
    assert samples.noise == pytest.approx(noise, rel=1e-5)
    assert samples.error == pytest.approx((noise / power) ** 0.5, rel=1e-5)
    assert sum(found.report().distributions["sum"].ratios.counts) == 3 * 2, "of both sites"


def test_what_was_put_in_includes_what_was_lost_before() -> None:
    """The second sum takes the first one's loss along: beside the sum of partials alone its error would be larger."""
    found = sites(1, fed_back=True)
    simulated(found, MAX_TOKENS, 4)
    alone = sites(1)
    simulated(alone, MAX_TOKENS, 4)
    fed, plain = (each.report().sites["b"].samples for each in (found, alone))
    assert fed is not None and plain is not None
    assert fed.error == pytest.approx(plain.error, rel=0.1)


def test_where_ranks_see_their_own_part_exactly_the_error_is_what_they_see() -> None:
    """Of two payloads' errors each rank sees one: the error is smaller by the square root of two."""
    read, unread = sites(1, fed_back=True, read=True), sites(1, fed_back=True)
    simulated(read, MAX_TOKENS, 8)
    simulated(unread, MAX_TOKENS, 8)
    seen, whole = (each.report().sites["a"].samples for each in (read, unread))
    assert seen is not None and whole is not None and seen.error is not None and whole.error is not None
    assert seen.error == pytest.approx(whole.error / 2**0.5, rel=0.1)
    of_read, of_unread = (each.report().distributions["sum"].residues for each in (read, unread))
    assert sum(of_read.counts) == 8 and sum(of_unread.counts) == 0
    assert 0.03 < of_read.total / 8 < 0.3, "about an error of one payload, over a stream of two"


@pytest.mark.parametrize("every", [1, 3])
def test_sampling_changes_no_bits_and_no_bytes(every: int) -> None:
    plain, watched = sites(0, fed_back=True), sites(every, fed_back=True)
    for expected, found in zip(simulated(plain, 5, 6), simulated(watched, 5, 6), strict=True):
        assert torch.equal(expected, found)
    without, with_samples = plain.report(), watched.report()
    assert without.bits_per_value == with_samples.bits_per_value
    assert without.sites["a"].samples is None and without.sites["a"].wire_bytes == with_samples.sites["a"].wire_bytes


def on_rank(every: int, algorithm: str) -> tuple[list[Tensor], Report]:
    transport = TcpTransport()
    found = sites(every, fed_back=True, read=True, algorithm=algorithm)
    wires = Communicator(found, tp=transport, pp=None)
    sums = []
    for time in range(6):
        for num_tokens in (1, 40):
            given = [values(seed + time, num_tokens)[transport.rank] for seed in (0, 50)]
            sums += forward(wires, given)
    return sums, found.report()


@needs_mesh
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_real_ranks_sample_what_the_simulation_does(ranks: Pools, algorithm: str) -> None:
    plain = [sums for sums, _ in ranks(2).run(on_rank, 0, algorithm)]
    reports = []
    for expected, (sums, report) in zip(plain, ranks(2).run(on_rank, 4, algorithm), strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(sums, expected, strict=True))
        reports.append(report)
    for report in reports:
        samples = report.sites["a"].samples
        assert samples is not None and samples.times == 3, "twelve calls, of which each fourth"
        assert samples.error is not None and 0.01 < samples.error < 0.2
        seconds = report.distributions["sum"].seconds
        assert sum(seconds["waiting"].counts) == 2 * 3 and seconds["encode"].total > 0
        paths = {each.way.path for each in report.sites["a"].passed}
        assert paths == {"call", "steps"}, "small sums but the sampled ones are made in one call"
        assert sum(each.times for each in report.sites["a"].passed) == 12


def test_values_that_are_not_finite_are_counted_apart() -> None:
    samples = Samples()
    exact = torch.ones(3, E)
    seen = exact.clone()
    seen[1, 4] = float("nan")
    samples.compare(seen[None], exact, 0.1)
    assert (samples.times, samples.num_non_finite, samples.error, samples.expected) == (1, 1, None, None)
    assert samples.compare(exact[None] * 1.17, exact, 0.1) == pytest.approx(1.7, rel=1e-6)
    assert samples.error == pytest.approx(0.17, rel=1e-6)


def test_each_sum_is_expected_to_err_as_its_own_algorithm_does() -> None:
    """Prompts by two_shot and tokens by one_shot, all as planned: nothing is out of the ordinary."""
    samples, exact = Samples(), torch.ones(4, E)
    for size, expected in ((10.0, 0.3), (1.0, 0.1)):
        ratio = samples.compare(size * exact[None] * (1 + expected), size * exact, expected)
        assert ratio == pytest.approx(1, rel=1e-5)
    assert samples.error == pytest.approx(samples.expected, rel=1e-5)
    assert samples.expected == pytest.approx(((0.3**2 * 100 + 0.1**2) / 101) ** 0.5)


def test_tokens_far_larger_than_others_are_left_out_as_in_calibration() -> None:
    exact = torch.ones(8, E)
    exact[0] = 1000
    seen = exact * 1.01
    seen[0] *= 2
    samples = Samples()
    samples.compare(seen[None], exact)
    assert samples.error == pytest.approx(0.01, rel=1e-3)


def test_sites_are_sampled_one_after_another() -> None:
    ahead = sorted(offset(index, 1000) for index in range(128))
    gaps = [after - before for before, after in itertools.pairwise(ahead)]
    assert min(gaps) >= 3, "no two of 64 layers in one forward"
    assert sampled(1).tolist() == [0] and sampled(3).tolist() == [0, 1, 2]
    assert len(sampled(512)) == MAX_TOKENS and sampled(512)[-1] == 511


def test_reports_with_samples_travel_as_json() -> None:
    found = sites(1, fed_back=True, read=True)
    simulated(found, 5, 3)
    report = found.report()
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    site = report.sites["a"]
    again = SiteReport.from_json(json.loads(json.dumps(asdict(site))))
    assert again == site and again.passed == site.passed
    assert site.codecs == ("feature", "feature") and site.kind == "sum"


def test_histograms_count_by_the_first_bound_that_is_not_exceeded() -> None:
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 7.0, float("nan")):
        histogram.add(number)
    assert histogram.counts == [2, 1, 2] and histogram.total == 10.0


@pytest.mark.parametrize("every", [-1, 1.5, True, "often"])
def test_another_number_of_calls_is_refused(every: object) -> None:
    with pytest.raises(InvalidInputError, match="sample_every: expected calls of a site"):
        check_sampling("sample_every", every)  # type: ignore[arg-type]


def answers(model: nn.Module, plan: Plan, ids: Tensor, every: int, **options: Any) -> tuple[Tensor, Tensor, Report]:
    with torch.no_grad(), narrowcast.attach(model, plan, sample_every=every, **options) as handle:
        logits = model(input_ids=ids).logits
        text = model.generate(ids[:, :8], max_new_tokens=12, do_sample=False)
        return logits, text, handle.report()


def model_on_rank(path: Path, ids: Tensor, every: int, chunks: Any) -> tuple[Tensor, Tensor, Report]:
    model = load_engine().load(MODEL, split=Split(tp_size=2))
    return answers(model, Plan.load(path), ids, every, prompt_chunks=chunks)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A plan of the bundled model for two ranks, and ordinary text."""
    tokenizer = load_engine().load_tokenizer(MODEL)
    ids = tokenizer((MODEL / "calibration.txt").read_text(), return_tensors="pt").input_ids[:, : 9 * 128].view(9, 128)
    plan = narrowcast.calibrate(load_engine().load(MODEL), list(ids[:8].split(1)), tp_size=2, codec="int4-feature")
    path = tmp_path_factory.mktemp("sampling") / "plan"
    plan.save(path)
    return path, ids[8:]


@needs_mesh
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_model_that_is_sampled_answers_as_it_did(ranks: Pools, planned: tuple[Path, Tensor], chunks: int) -> None:
    """Every fifth call, in recorded layers, in halves in turns: and what is seen is what the plan expects."""
    path, ids = planned
    plain = ranks(2).run(model_on_rank, path, ids, 0, chunks)
    sampled = ranks(2).run(model_on_rank, path, ids, 5, chunks)
    for (logits, text, _), (found, found_text, report) in zip(plain, sampled, strict=True):
        assert torch.equal(found, logits) and torch.equal(found_text, text)
        samples = [site.samples for site in report.sites.values() if site.samples is not None]
        assert min(each.times for each in samples) > 0
        ways = {each.way.path for site in report.sites.values() for each in site.passed}
        assert {"steps", "call", "layer"} <= ways


def test_on_ordinary_text_a_model_errs_as_its_plan_says(planned: tuple[Path, Tensor]) -> None:
    path, ids = planned
    _, _, report = answers(load_engine().load(MODEL), Plan.load(path), ids, 1, simulate=True, algorithm="one_shot")
    found = [site.samples for site in report.sites.values() if site.samples is not None and site.samples.expected]
    assert len(found) >= 15
    ratios = [each.error / each.expected for each in found if each.error and each.expected]
    assert 0.8 < statistics.median(ratios) < 1.25 and max(ratios) < 2
    num_read = sum(sum(each.residues.counts) for each in report.distributions.values())
    assert num_read == sum(each.times for each in found[:-1]), "read but for the last"


# A codec, ranks, and what else calibration is asked for: sums that feed back and are read with a rank's own loss made
# good, with codecs that do not, and without either.
COARSE, FINE = ("int4-feature", "allocated(bits=3)", "transform(axes=site)"), ("int8-feature", "allocated(bits=4)")
PLANNED: list[tuple[str, int, dict[str, Any]]] = [
    *((codec, 2, {}) for codec in COARSE),
    *((codec, 3, {}) for codec in (*FINE, "transform", "fp8", "mxfp4", "int4-group32-sym")),
    *((codec, 2, {"feedback": False}) for codec in ("int8-feature", "transform")),
    ("int4-feature", 4, {"groups": [[0, 1], [2, 3]]}),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("llama", tmp_path_factory.mktemp("sampling") / "model")


@pytest.mark.parametrize(("codec", "tp_size", "options"), PLANNED)
def test_a_plan_expects_what_is_sampled(small: Path, codec: str, tp_size: int, options: dict[str, Any]) -> None:
    """On the text that it was measured on, of as many tokens as are compared: to the last digit."""
    model = load_engine().load(small)
    text = [random_ids(1, MAX_TOKENS, seed=seed) for seed in range(4)]
    plan = narrowcast.calibrate(model, text, tp_size=tp_size, codec=codec, **options)
    for algorithm in ("one_shot", "two_shot", *(["hierarchical"] if plan.groups else [])):
        with (
            torch.no_grad(),
            narrowcast.attach(
                model, plan, simulate=True, sample_every=1, algorithm=algorithm, prompt_chunks=1
            ) as handle,
        ):
            model(text[0])  # one of four is held out
            report = handle.report()
        for name, site in plan.sites.items():
            samples = report.sites[name].samples
            assert samples is not None and samples.times == 1
            assert samples.error == pytest.approx(site.error[algorithm], rel=1e-5)
            assert samples.expected == pytest.approx(site.error[algorithm], rel=1e-5)


def test_sums_that_do_not_feed_back_as_planned_are_not_compared_with_the_plan(small: Path) -> None:
    model, text = load_engine().load(small), random_ids(1, 8)
    plan = narrowcast.calibrate(model, [text], tp_size=2, codec="int4-feature")
    assert plan.feedback.chains
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, sample_every=1, feedback=False) as handle:
        model(text)
        samples = [site.samples for site in handle.report().sites.values() if site.coded]
    assert all(each is not None and each.error and each.expected is None for each in samples)
