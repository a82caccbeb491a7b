"""Transforms: what travels as components answers alike on ranks and simulated, in as many bits as were asked for."""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import narrowcast
from conftest import MODEL
from models import SMALL, random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.codecs import AllocatedCodec, AllocatedRecipe, CastCodec, TransformRecipe
from narrowcast.engines import load_engine
from narrowcast.errors import PlanFormatError, PlanMismatchError
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.split import Split
from narrowcast.plan.summary import bits_by_site
from narrowcast.plan.transform import Part, Remix, Transform
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.products import Dense, components
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
COSTS = Path(__file__).parents[1] / "benchmarks" / "transform_costs.py"


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


def of_ranks(num_features: int, tp_size: int, kept: int) -> Transform:
    """Axes of its own for each rank, the first `kept` of an orthogonal matrix."""
    parts = [
        Part(start=0, rank=rank, analysis=axes[:kept], synthesis=axes[:kept].T)
        for rank, axes in enumerate(orthogonal(num_features, seed) for seed in range(tp_size))
    ]
    return Transform(num_features=num_features, parts=tuple(parts))


def of_blocks(sizes: tuple[int, ...]) -> Transform:
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    axes = [orthogonal(size, seed) for seed, size in enumerate(sizes)]
    parts = [
        Part(start=start, rank=None, analysis=each, synthesis=each.T) for start, each in zip(starts, axes, strict=True)
    ]
    return Transform(num_features=sum(sizes), parts=tuple(parts))


TRANSFORMS = {"ranks": of_ranks(24, 3, 24), "truncated": of_ranks(24, 3, 5), "blocks": of_blocks((10, 10, 4))}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_folded_weights_compute_the_components_of_the_products(name: str) -> None:
    """In fp32: sums of 16 and of 24 terms in another order, each within n * 2**-24 of its terms' magnitudes."""
    transform = TRANSFORMS[name]
    generator = torch.Generator().manual_seed(0)
    weight_EF, x_TF = torch.randn(24, 16, generator=generator), torch.randn(7, 16, generator=generator)
    for rank in range(3):
        folded = transform.fold(weight_EF, rank)
        own = transform.own(rank)
        assert folded.shape == (own.stop - own.start, 16), "only the rank's own components are computed"
        expected = transform.analyze(x_TF @ weight_EF.T, rank)
        magnitude = max(float(part.analysis.abs().sum(dim=1).max()) for part in transform.parts) * float(
            (x_TF.abs() @ weight_EF.abs().T).max()
        )
        found = transform.placed(x_TF @ folded.T, rank)
        assert found.shape == (7, transform.num_components)
        assert float((found - expected).abs().max()) <= 2 * (16 + 24) * 2**-24 * magnitude


def test_a_sum_of_components_is_a_concatenation() -> None:
    """Each rank's components stand where all others put zeros; blocks of all ranks add up at the same places."""
    transform = TRANSFORMS["truncated"]
    x_RTE = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    components = torch.stack([transform.analyze(x, rank) for rank, x in enumerate(x_RTE)])
    assert components.shape == (3, 7, 15)
    for rank in range(3):
        outside = torch.ones(15, dtype=torch.bool)
        outside[transform.own(rank)] = False
        assert torch.equal(components[rank][:, outside], torch.zeros(7, 10))
        assert torch.equal(components.sum(0)[:, ~outside], components[rank][:, ~outside])
    assert TRANSFORMS["blocks"].own(0) == TRANSFORMS["blocks"].own(2) == slice(0, 24)


@pytest.mark.parametrize("name", ["ranks", "blocks"])
def test_where_nothing_is_dropped_synthesis_gives_the_sum_back(name: str) -> None:
    transform = TRANSFORMS[name]
    x_RTE = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    total = sum(transform.analyze(x, rank) for rank, x in enumerate(x_RTE))
    assert torch.allclose(transform.synthesize(total, remixed=False), x_RTE.sum(0), atol=1e-5)  # 3 * 24 terms, fp32


def test_what_is_dropped_is_projected_away() -> None:
    """Each rank's share of the sum lies in the span of the axes that it kept: numpy says where."""
    transform = TRANSFORMS["truncated"]
    x_RTE = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    total = sum(transform.analyze(x, rank) for rank, x in enumerate(x_RTE))
    expected = sum(
        x.double().numpy() @ part.synthesis.double().numpy() @ part.analysis.double().numpy()
        for part, x in zip(transform.parts, x_RTE, strict=True)
    )
    found = transform.synthesize(total, remixed=False).double().numpy()
    assert abs(found - expected).max() < 1e-5


def test_a_remixed_sum_has_a_synthesis_of_its_own() -> None:
    total = orthogonal(24, 9)
    synthesis = torch.cat([part.synthesis for part in TRANSFORMS["ranks"].parts], dim=1)
    remixed = replace(TRANSFORMS["ranks"], remix=Remix(mix=total[:6] @ synthesis, synthesis=total[:6].T))
    assert (remixed.num_components, remixed.num_reduced) == (72, 6)
    z_TK = torch.randn(7, 72, generator=torch.Generator().manual_seed(0))
    features = remixed.synthesize(z_TK, remixed=False)
    z_TJ = z_TK @ remixed.remix.mix.T  # type: ignore[union-attr]
    assert torch.allclose(remixed.synthesize(z_TJ, remixed=True), features @ total[:6].T @ total[:6], atol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_makes_the_same_transform_again(name: str) -> None:
    config, tensors = TRANSFORMS[name].state()
    again = Transform.from_state(config, tensors)
    z_TK = torch.randn(7, again.num_components, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.synthesize(z_TK, remixed=False), TRANSFORMS[name].synthesize(z_TK, remixed=False))
    assert again.nbytes == TRANSFORMS[name].nbytes == sum(each.numel() * 4 for each in tensors.values())


def test_matrices_that_do_not_fit_are_refused() -> None:
    config, tensors = TRANSFORMS["blocks"].state()
    for wrong in (
        (config | {"num_features": 25}, tensors),
        (config, tensors | {"analysis1": tensors["analysis1"][:3]}),
        (config, tensors | {"mix": torch.ones(2, 5), "remixed": torch.ones(24, 2)}),
        ({"num_features": 24, "parts": []}, tensors),
    ):
        with pytest.raises(InvalidInputError, match=r"features and their components.*Calibrate again"):
            Transform.from_state(*wrong)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused(dtype: torch.dtype) -> None:
    """Into 8 bits, whose scale stands elsewhere, nothing can be folded."""
    product = Dense(lambda: torch.ones(24, 16).to(dtype), 24)
    with pytest.raises(
        InvalidInputError, match=rf"floating point of 16 bits or more.*found {str(dtype)[6:]}. Load the"
    ):
        components(product, TRANSFORMS["blocks"], 0)


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
    plan = narrowcast.calibrate(transformers.load(MODEL), ids, tp_size=4, codec=codec)
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
    model = transformers.load(MODEL)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True) as handle:
        return model(ids).logits, handle.report().bits_per_value


def logits_on_rank(folder: Path, plan: Path, ids: Tensor) -> tuple[Tensor, float | None]:
    model = transformers.load(folder, split=Split(tp_size=dist.get_world_size()))
    with torch.no_grad(), narrowcast.attach(model, Plan.load(plan)) as handle:
        return model(ids).logits, handle.report().bits_per_value


@pytest.mark.parametrize("name", ["mixtral", "llama-biased", "llama-starved"])
def test_experts_biases_and_ranks_without_columns(ranks: Pools, tmp_path: Path, name: str) -> None:
    """Experts make their partial sums themselves, which are analyzed as they are."""
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
    """A token's scale is of all its components, so that features cannot be shared out; synthesis follows suit."""
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
    """Without their transforms, which drop something: what single sites cost would be counted at all of them."""
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
        assert (site.transform is not None) == (site.kind == "sum") == isinstance(site.codecs[0], AllocatedCodec)
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


def transform_costs() -> Any:
    spec = importlib.util.spec_from_file_location("transform_costs", COSTS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(COSTS.parent), *sys.path]):  # scripts import each other
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", FORMS)
def test_the_cost_table_counts_a_plan_s_bytes(folder: Path, form: str) -> None:
    """All tensors of a real plan's file; and weights as they are folded."""
    table, plan = transform_costs(), a_plan(transformers.load(folder), 4, form, 6.0)
    stored = safetensors.torch.load(plan.to_bytes())
    expected = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert sum(table.plan_nbytes(site.transform, 96, 4) for site in plan.sites.values()) == expected
    full = [site.transform for site in plan.sites.values() if is_full(site.transform)]
    assert bool(full) == (form != "features")
    for real in full:
        made = {"site": table.of_site(96, 96), "blocks": table.of_blocks(96, 40)}.get(form) or table.of_ranks(
            96, 4, real.own(0).stop, real.num_reduced
        )
        folded = real.fold(torch.ones(96, 35).bfloat16(), 0)
        counted = table.costs(made, 96, 140, 4)
        assert made.nbytes == real.nbytes
        assert (counted.product, counted.folded_nbytes) == (folded.numel(), 2 * folded.numel())


def is_full(transform: Transform | None) -> TypeGuard[Transform]:
    """Whether nothing was dropped, or as much at every rank: what the table's shapes are of."""
    if transform is None:
        return False
    each = {len(part.analysis) for part in transform.parts}
    return len(each) == 1 if transform.axes == "ranks" else transform.num_components == transform.num_features


def chunked(num_tokens: int) -> tuple[Tensor, Tensor]:
    """The sum of products with random weights in chunks of few tokens, mixed in between, and its simulation."""
    transport = TorchDistributedTransport()
    transport.chunk_values = 1000  # type: ignore[misc]
    site = transformed_plan(3).sites["s"]
    assert site.transform is not None
    inputs = [
        tokens.bfloat16() for tokens in torch.randn(3, num_tokens, 48, generator=torch.Generator().manual_seed(0))
    ]
    weights = [orthogonal(64, rank)[:, :48].bfloat16() for rank in range(3)]

    def sites() -> Sites:
        return Sites({"s": site.codecs}, (), "two_shot", torch.device("cpu"), transforms={"s": site.transform})

    communicator = Communicator(sites(), tp=transport, pp=None)
    real = communicator.row_parallel("s", [Dense(lambda: weights[transport.rank], 64)])(inputs[transport.rank])
    columns = [slice(48 * rank, 48 * (rank + 1)) for rank in range(3)]
    products = [Dense(lambda weight=weight: weight, 64, own) for weight, own in zip(weights, columns, strict=True)]  # type: ignore[misc]
    simulator = Simulator(sites(), 3)
    return real, simulator.row_parallel("s", products)(torch.cat(inputs, dim=1))


def test_components_travel_in_chunks(ranks: Pools) -> None:
    """Each token is mixed by one rank: all end with the same bits, and within bf16's last place of the simulation,
    whose matrix products are of other numbers of tokens."""
    results = ranks(3).run(chunked, 100)
    for real, simulated in results:
        assert torch.equal(real, results[0][0])
        assert torch.allclose(real.float(), simulated.float(), rtol=2**-7, atol=2**-7 * float(simulated.abs().max()))
