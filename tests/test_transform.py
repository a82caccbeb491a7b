"""Transforms: what travels as components answers alike on ranks and simulated, in as many bits as were asked for."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import narrowcast
from conftest import MODEL
from models import SMALL, random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.calibration.metric import in_common
from narrowcast.calibration.sensitivity import Sensitivity
from narrowcast.codecs import AllocatedRecipe, CastCodec, TransformCodec, TransformRecipe
from narrowcast.codecs.allocation import BLOCK
from narrowcast.codecs.base import NON_FINITE
from narrowcast.codecs.fitted import fitted
from narrowcast.collectives import Hops, named
from narrowcast.engines import load_engine
from narrowcast.errors import PlanFormatError, PlanMismatchError
from narrowcast.plan.chains import Chains
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.split import Split
from narrowcast.plan.summary import bits_by_site
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.feedback import Feedback
from narrowcast.runtime.products import Dense
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks
from test_attach import check_against_simulation
from test_decision import transformed_plan
from test_failure import generate_until_lost, wait_for_all

Pools = Callable[[int], Ranks]
transformers = load_engine()

FORMS = "features", "site", "blocks", "ranks"


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


def a_codec(name: str, bits: int = 8) -> TransformCodec:
    """Between 24 features of three ranks and components along the first rows of orthogonal matrices."""
    num_axes, num_blocks, kept, size = FORMS_OF_CODECS[name]
    axes = [[orthogonal(size, 7 * number + block)[:kept] for block in range(num_blocks)] for number in range(num_axes)]
    analysis = torch.stack([torch.stack(each) for each in axes]).bfloat16()
    scale = torch.ones(3, num_blocks * kept)
    return TransformCodec(
        size=24,
        analysis=analysis,
        synthesis=analysis.mT,
        components=fitted(scale, torch.full((3, -(-scale.shape[1] // BLOCK)), bits, dtype=torch.uint8)),
    )


# Sets of axes, blocks, components and features of each: two blocks of 15 hold 24 features and zeros.
FORMS_OF_CODECS = {
    "ranks": (3, 1, 24, 24),
    "truncated": (3, 1, 5, 24),
    "site": (1, 1, 20, 24),
    "blocks": (1, 2, 15, 15),
}
WHOLE = "ranks", "blocks"  # of whose axes none is left out

every_form = pytest.mark.parametrize("name", FORMS_OF_CODECS)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def projected(codec: TransformCodec, x_TE: Tensor, rank: int) -> Any:
    """Features, to components and back, by numpy in FP64: no coding."""
    number = rank if len(codec.analysis) > 1 else 0
    there, back = (side[number].double().numpy() for side in (codec.analysis, codec.synthesis))
    size = there.shape[-1]
    x = np.pad(x_TE.double().numpy(), ((0, 0), (0, len(there) * size - 24)))
    parts = [x[:, own * size : (own + 1) * size] @ there[own].T @ back[own].T for own in range(len(there))]
    return np.concatenate(parts, axis=1)[:, :24]


@every_form
def test_what_comes_back_is_what_the_axes_hold(name: str) -> None:
    """At 8 bits a component; and the sum over ranks is that of what comes back of each."""
    codec, x_RTE = a_codec(name), values(3, 7, 24)
    payloads = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(x_RTE)])
    total = 0
    for rank, x_TE in enumerate(x_RTE):
        expected, found = projected(codec, x_TE, rank), codec.decode(payloads[rank], source=rank)
        assert abs(found.numpy() - expected).max() < 0.1
        if name in WHOLE:
            assert abs(expected - x_TE.numpy()).max() < 0.05, "axes rounded to BF16 are orthogonal within that"
        total += found.double()
    assert torch.allclose(codec.decode_sum(payloads).double(), total, atol=1e-5)


@every_form
def test_errors_stay_within_the_bound(name: str) -> None:
    for bits in (1, 4, 8):
        codec, x_TE = a_codec(name, bits), 3 * values(50, 24)
        for source in range(3):
            found = codec.decode(codec.encode(x_TE, source=source), source=source)
            assert ((found - x_TE).abs() <= codec.error_bound(x_TE, source=source)).all()


@every_form
def test_a_residue_is_what_the_payload_lost_of_both(name: str) -> None:
    """What axes leave out is lost, too, for those to come that hold it."""
    codec, x_TE, before = a_codec(name, 2), values(7, 24), 0.1 * values(7, 24).flip(0)
    residue = before.clone()
    payload = codec.encode(x_TE, source=1, residue=residue)
    assert torch.equal(payload, codec.encode(x_TE + before, source=1))
    assert torch.equal(residue, x_TE + before - codec.decode(payload, source=1))


@every_form
def test_what_is_not_finite_is_nan_in_all_of_its_token(name: str) -> None:
    codec, x_TE = a_codec(name), values(3, 24)
    x_TE[1, 4] = float("inf")
    stats = torch.zeros(3, dtype=torch.int64)
    found = codec.decode(codec.encode(x_TE, source=0, stats=stats), source=0)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    assert stats[NON_FINITE] > 0


@every_form
def test_state_makes_the_same_codec_again(name: str) -> None:
    codec, x_TE = a_codec(name), values(7, 24)
    again = TransformCodec.from_state(*codec.state())
    assert again.axes == codec.axes == name.replace("truncated", "ranks")
    assert torch.equal(again.encode(x_TE, source=2), codec.encode(x_TE, source=2))
    chosen, payload = codec.sources((2, 0)), codec.encode(x_TE, source=2)
    assert torch.equal(chosen.encode(x_TE, source=0), payload)
    assert torch.equal(chosen.decode(payload, source=0), codec.decode(payload, source=2))


@every_form
def test_sources_with_axes_of_their_own_feed_nothing_back(name: str) -> None:
    """What is there already stays for sites to come; the sum, along one set of axes, feeds back in any case."""
    codec, x_RTE, before = a_codec(name, 2), values(3, 6, 24), 0.1 * values(4, 6, 24)
    of_sum = replace(a_codec("site", 2), components=a_codec("site", 2).components.sources((0,)))
    residue = before.clone()
    hops = Feedback(num_sources=(3, 1)).hops(Hops((codec, of_sum)), residue)
    named("two_shot").twin(x_RTE, hops, None)
    assert torch.equal(residue[:3], before[:3]) == (codec.axes == "ranks")
    assert not torch.equal(residue[3], before[3])


def test_sites_of_a_chain_share_one_metric() -> None:
    """Up to a factor: the mean of their own, times what a passing error costs of what a lasting one does."""
    squares = {site: values(4, 4).mT @ values(4, 4) * factor for site, factor in (("a", 1.0), ("b", 5.0))}
    squares["b"] += torch.ones(4).diag()
    squares["alone"] = torch.ones(4).diag()
    tried = {site: Sensitivity(lasting=torch.full((4,), 2.0), fed_back=torch.ones(4)) for site in squares}
    found = in_common(squares, tried, Chains(chains=(("a", "b"),)))
    assert torch.equal(found["alone"], squares["alone"])
    ratio = found["a"] / found["b"]
    assert torch.allclose(ratio, ratio[0, 0].expand(4, 4))
    for site in ("a", "b"):  # with a tenth in all directions besides
        assert found[site].diagonal().mean() == pytest.approx(1.1 / 2 * squares[site].diagonal().mean().item())
        assert torch.equal(found[site], found[site].mT)


def test_a_site_that_costs_nothing_leaves_the_metric_of_others_whole() -> None:
    """A layer whose weights are zero, say."""
    squares = {"a": torch.eye(4), "b": torch.zeros(4, 4)}
    tried = {site: Sensitivity(*[each.diagonal()] * 2) for site, each in squares.items()}
    found = in_common(squares, tried, Chains(chains=(("a", "b"),)))
    assert torch.allclose(found["a"], torch.eye(4) * (0.5 + 0.1)) and torch.equal(found["b"], squares["b"])


def test_matrices_that_do_not_fit_are_refused() -> None:
    config, tensors = a_codec("blocks").state()
    for wrong in (
        (config | {"size": 31}, tensors),
        (config | {"size": 15}, tensors),
        (config, tensors | {"analysis": tensors["analysis"][:, :, :3]}),
        (config, tensors | {"analysis": tensors["analysis"].float()}),
        (config, tensors | {"synthesis": tensors["synthesis"] * float("nan")}),
    ):
        with pytest.raises(InvalidInputError, match=r"features and the components of its codec.*Calibrate again"):
            TransformCodec.from_state(*wrong)
    with pytest.raises(InvalidInputError, match="24 features, as calibrated, found 25"):
        a_codec("blocks").encode(values(2, 25), source=0)


def save_with_heads(num_heads: int, folder: Path) -> Path:
    torch.manual_seed(0)
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_heads}
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | heads)).bfloat16().save_pretrained(folder)
    return folder


# How a codec is fitted, by the axes along which it codes.
RECIPES = {
    "features": AllocatedRecipe(),
    "site": TransformRecipe(axes="site"),
    "blocks": TransformRecipe(axes="blocks", block_size=40),
    "ranks": TransformRecipe(axes="ranks"),
}


def a_plan(model: nn.Module, tp_size: int, form: str, bits: float = 2.0, algorithm: str | None = None) -> Plan:
    recipe = replace(RECIPES[form], bits=bits, algorithm=algorithm)
    return narrowcast.calibrate(model, [random_ids(8, 40, seed=1)], tp_size=tp_size, codec=recipe)


@pytest.mark.parametrize(
    ("algorithm", "tp_size", "num_heads"), [("one_shot", 2, 4), ("two_shot", 3, 6), ("one_shot", 4, 4)]
)
@pytest.mark.parametrize("form", FORMS)
def test_real_ranks_equal_the_simulation(
    ranks: Pools, tmp_path: Path, form: str, algorithm: str, tp_size: int, num_heads: int
) -> None:
    """Logits in bf16, tokens generated one by one, and bytes. Columns are shared out unevenly among three ranks."""
    folder = save_with_heads(num_heads, tmp_path / "model")
    plan = a_plan(transformers.load(folder), tp_size, form)
    ids = random_ids(3, 16)
    check_against_simulation(ranks, folder, plan, ids, torch.ones_like(ids), algorithm)


@pytest.mark.parametrize("form", FORMS)
def test_the_bundled_model_on_four_ranks(ranks: Pools, tmp_path: Path, form: str) -> None:
    """Which algorithm runs is left to what sends fewer bytes: two_shot, whose payloads are budgeted."""
    folder = tmp_path / "model"
    folder.symlink_to(MODEL, target_is_directory=True)
    ids = text()
    codec = "allocated(bits=2)" if form == "features" else f"transform(axes={form}, bits=2)"
    plan = narrowcast.calibrate(transformers.load(MODEL, dtype="float32"), ids, tp_size=4, codec=codec)
    plan.save(tmp_path / "plan")
    expected = simulated_logits(plan, ids[0])
    for logits, bits in ranks(4).run(logits_on_rank, MODEL, tmp_path / "plan", ids[0]):
        assert torch.equal(logits, expected[0])
        assert bits == expected[1]
    assert expected[1] == pytest.approx(2.0, abs=0.1)


def text() -> list[Tensor]:
    tokenizer = transformers.load_tokenizer(MODEL)
    documents = (MODEL / "calibration.txt").read_text(encoding="utf8").split("\f")[:3]
    return [tokenizer(document, return_tensors="pt").input_ids[:, :32] for document in documents]


def simulated_logits(plan: Plan, ids: Tensor) -> tuple[Tensor, float | None]:
    model = transformers.load(MODEL, dtype="float32")
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True) as handle:
        return model(ids).logits, handle.report().bits_per_value


def logits_on_rank(folder: Path, plan: Path, ids: Tensor) -> tuple[Tensor, float | None]:
    model = transformers.load(folder, split=Split(tp_size=dist.get_world_size()), dtype="float32")
    with torch.no_grad(), narrowcast.attach(model, Plan.load(plan)) as handle:
        return model(ids).logits, handle.report().bits_per_value


@pytest.mark.parametrize("name", ["mixtral", "llama-biased", "llama-starved"])
def test_experts_biases_and_ranks_without_columns(ranks: Pools, tmp_path: Path, name: str) -> None:
    """Experts make their partial sums themselves."""
    folder = save_random(name, tmp_path / "model")
    plan = a_plan(transformers.load(folder), 4, "ranks")
    ids = random_ids(3, 16)
    check_against_simulation(ranks, folder, plan, ids, torch.ones_like(ids))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("llama", tmp_path_factory.mktemp("random") / "model")


@pytest.mark.parametrize(("algorithm", "tp_size"), [("one_shot", 2), ("one_shot", 4), ("two_shot", 4)])
@pytest.mark.parametrize("form", FORMS)
def test_bits_are_what_was_asked_for(folder: Path, form: str, algorithm: str, tp_size: int) -> None:
    """Of the features that the components stand for, scales included."""
    model = transformers.load(folder)
    plan = a_plan(model, tp_size, form, 3.0, algorithm=algorithm)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
        model(random_ids(3, 16))
    assert handle.report().bits_per_value == pytest.approx(3.0, abs=0.1)


def test_with_fewer_tokens_than_ranks_one_shot_runs(folder: Path) -> None:
    """A token's scale is of all its components, so that features cannot be shared out."""
    model = transformers.load(folder)
    plan = a_plan(model, 4, "ranks", 6.0)
    outputs = {}
    for algorithm in ("one_shot", "two_shot"):
        with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
            outputs[algorithm] = model(random_ids(1, 3)).logits, handle.report().bits_per_value
    assert torch.equal(outputs["one_shot"][0], outputs["two_shot"][0])
    assert outputs["one_shot"][1] == outputs["two_shot"][1]


def test_remove_restores_the_model(folder: Path) -> None:
    model = transformers.load(folder)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        before = model(random_ids(2, 9)).logits
        handle = narrowcast.attach(model, a_plan(model, 2, "ranks"), simulate=True)
        assert not torch.equal(model(random_ids(2, 9)).logits, before)
        handle.remove()
        assert torch.equal(model(random_ids(2, 9)).logits, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_plan_survives_saving_and_serves_no_other_model(folder: Path, tmp_path: Path, form: str) -> None:
    model = transformers.load(folder)
    plan = a_plan(model, 4, form)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.fingerprint == plan.fingerprint
    logits = []
    for each in (plan, loaded):
        with torch.no_grad(), narrowcast.attach(model, each, simulate=True):
            logits.append(model(random_ids(2, 9)).logits)
    assert torch.equal(*logits)
    other = transformers.load(save_random("llama", tmp_path / "other", seed=7))
    with pytest.raises(PlanMismatchError, match="weights that the plan was"):
        narrowcast.attach(other, loaded, simulate=True)
    data = (tmp_path / "plan").read_bytes()
    (tmp_path / "plan").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PlanFormatError, match="altered"):
        Plan.load(tmp_path / "plan")


def test_a_site_alone_leaves_all_others_plain(folder: Path) -> None:
    """Without components, which drop something: what single sites cost would be counted at all of them."""
    model = transformers.load(folder)
    plan = a_plan(model, 2, "ranks")
    bare = a_plan(model, 2, "features").only(())
    logits = []
    for each in (plan.only(()), bare):
        with torch.no_grad(), narrowcast.attach(model, each, simulate=True):
            logits.append(model(random_ids(2, 9)).logits)
    assert torch.equal(*logits)


def test_no_bits_for_a_site_are_no_error(folder: Path) -> None:
    """A byte a token is all that travels there: its scale."""
    model = transformers.load(folder)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight *= 0.01
    for form in FORMS:
        plan = a_plan(model, 4, form, 0.42)  # a block of one bit for each site, on average
        bits = [bits[0] for bits in bits_by_site(plan).values()]
        with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, algorithm="one_shot") as handle:
            assert model(random_ids(2, 9)).logits.isfinite().all()
        assert min(bits) == 8 / 96
        assert sorted(site.bits_per_value or 1 for site in handle.report().sites.values() if site.coded) == sorted(bits)


def counted(folder: Path, plan: Path, ids: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
    model = transformers.load(folder, split=Split(tp_size=dist.get_world_size()))
    loaded = Plan.load(plan)
    with torch.no_grad():
        with narrowcast.attach(model, loaded.only(())):
            plain = model(input_ids=ids).logits
        with narrowcast.attach(model, loaded, count_only=True) as handle:
            logits, report = model(input_ids=ids).logits, handle.report()
        with narrowcast.attach(model, loaded) as handle:
            model(input_ids=ids)
            return plain, logits, report.sites, handle.report().sites


def test_counting_only_sends_features_and_counts_components(ranks: Pools, folder: Path, tmp_path: Path) -> None:
    model, ids = transformers.load(folder), random_ids(2, 8)
    a_plan(model, 4, "ranks").save(tmp_path / "plan")
    for plain, logits, planned, sent in ranks(4).run(counted, folder, tmp_path / "plan", ids):
        assert torch.allclose(logits.float(), plain.float(), atol=0.05)  # fp32 sums in the one, bf16 in the other
        for name, site in planned.items():
            assert (site.wire_bytes, site.num_values) == (sent[name].wire_bytes, sent[name].num_values)


@pytest.mark.parametrize("deterministic", [False, True])
def test_decisions_and_deterministic_hold_for_components(
    ranks: Pools, folder: Path, tmp_path: Path, deterministic: bool
) -> None:
    """By the number of tokens: plain, then native, then coded; or one way for all sizes."""
    table = tuple(
        (start, Choice.parse(way)) for start, way in ((1, "plain one_shot"), (6, "native"), (9, "coded one_shot"))
    )
    plan = replace(a_plan(transformers.load(folder), 2, "ranks"), decisions=Decisions(coded={96: table}))
    plan.save(tmp_path / "plan")
    sizes = [3, 7, 12]
    results = ranks(2).run(of_sizes, folder, tmp_path / "plan", sizes, deterministic)
    model = transformers.load(folder)
    bits, logits = [], []
    for size in sizes:
        with (
            torch.no_grad(),
            narrowcast.attach(model, plan, simulate=True, deterministic=deterministic) as handle,
        ):
            logits.append(model(random_ids(1, size)).logits)
            bits.append(handle.report().bits_per_value)
    for found_logits, found_bits in results:
        assert found_bits == bits
        assert all(torch.equal(*pair) for pair in zip(found_logits, logits, strict=True))
    assert bits[2] == pytest.approx(2.0, abs=0.1)
    assert bits[:2] == [bits[2] if deterministic else 16] * 2


def of_sizes(folder: Path, plan: Path, sizes: list[int], deterministic: bool) -> tuple[list[Tensor], list[Any]]:
    model, logits, bits = transformers.load(folder, split=Split(tp_size=2)), [], []
    for size in sizes:
        with torch.no_grad(), narrowcast.attach(model, Plan.load(plan), deterministic=deterministic) as handle:
            logits.append(model(input_ids=random_ids(1, size)).logits)
            bits.append(handle.report().bits_per_value)
    return logits, bits


def test_only_the_sums_are_of_components(folder: Path) -> None:
    """Embedding and logits of the same model travel as asked: as they are, or coded by a preset."""
    model = transformers.load(folder)
    recipe = {"sum": "transform(bits=2)", "embedding": "int8-group128", "logits": "bf16"}
    plan = narrowcast.calibrate(model, [random_ids(8, 40, seed=1)], tp_size=2, codec=recipe)
    for site in plan.sites.values():
        assert isinstance(site.codecs[0], TransformCodec) == (site.kind == "sum")
    assert isinstance(plan.sites["lm_head"].codecs[0], CastCodec)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True):
        assert model(random_ids(2, 9)).logits.isfinite().all()


def test_a_rank_killed_during_transformed_sums_is_named(folder: Path, tmp_path: Path) -> None:
    plan, marks = tmp_path / "plan", tmp_path / "marks"
    a_plan(transformers.load(folder), 2, "ranks").save(plan)
    marks.mkdir()
    pool = Ranks(2)
    try:
        pool.start(generate_until_lost, folder, plan, marks)
        wait_for_all(marks, 2)
        time.sleep(0.3)
        os.kill(pool.processes[1].pid, signal.SIGKILL)
        assert pool.result(0) == (1,)
    finally:
        pool.close()


def chunked(num_tokens: int) -> tuple[Tensor, Tensor]:
    """The sum of products with random weights in chunks of few tokens, and its simulation."""
    transport = TorchDistributedTransport()
    transport.chunk_values = 1000  # type: ignore[misc]
    site = transformed_plan(3).sites["s"]
    inputs = [
        tokens.bfloat16() for tokens in torch.randn(3, num_tokens, 48, generator=torch.Generator().manual_seed(0))
    ]
    weights = [orthogonal(64, rank)[:, :48].bfloat16() for rank in range(3)]

    def sites() -> Sites:
        return Sites({"s": site.codecs}, (), "two_shot", torch.device("cpu"))

    communicator = Communicator(sites(), tp=transport, pp=None)
    real = communicator.row_parallel("s", [Dense(lambda: weights[transport.rank], 64)])(inputs[transport.rank])
    columns = [slice(48 * rank, 48 * (rank + 1)) for rank in range(3)]
    products = [Dense(lambda weight=weight: weight, 64, own) for weight, own in zip(weights, columns, strict=True)]  # type: ignore[misc]
    simulator = Simulator(sites(), 3)
    return real, simulator.row_parallel("s", products)(torch.cat(inputs, dim=1))


def test_components_travel_in_chunks(ranks: Pools) -> None:
    """All ranks end with the same bits, and within bf16's last place of the simulation, whose matrix products are of
    other numbers of tokens."""
    results = ranks(3).run(chunked, 100)
    for real, simulated in results:
        assert torch.equal(real, results[0][0])
        assert torch.allclose(real.float(), simulated.float(), rtol=2**-7, atol=2**-7 * float(simulated.abs().max()))
