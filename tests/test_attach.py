"""attach: a model on real ranks answers as its one-process simulation does, bit for bit in bf16.

On one machine matrix products of a rank's slice give the same bits in a rank and in the simulation (one thread
each); docs/architecture.md says what is promised elsewhere.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import narrowcast
from conftest import MODEL
from models import CONFIGS, random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.engines import load_engine
from narrowcast.errors import PlanMismatchError
from narrowcast.plan.split import Split
from narrowcast.runtime.reports import Report
from ranks import Ranks

Pools = Callable[[int], Ranks]
transformers = load_engine()
EVERYWHERE = dict.fromkeys(("sum", "last"), "int4-feature")


def forwards_of(model: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__.get("forward") for name, module in model.named_modules()}


def on_rank(folder: Path, plan: Path, ids: Tensor, mask: Tensor, algorithm: str) -> dict[str, Any]:
    """Logits before, during and after attach, and a greedy continuation."""
    model = transformers.load(folder, split=Split(tp_size=dist.get_world_size()))
    forwards = forwards_of(model)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        with narrowcast.attach(model, Plan.load(plan), algorithm=algorithm) as handle:
            during = model(input_ids=ids, attention_mask=mask).logits
            report = handle.report()
            text = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(before, after)
    assert forwards_of(model) == forwards
    return {"before": before, "during": during, "text": text, "report": report}


def simulated(folder: Path, plan: Plan, ids: Tensor, mask: Tensor, algorithm: str) -> tuple[Tensor, Tensor, Report]:
    model = transformers.load(folder)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
        logits = model(input_ids=ids, attention_mask=mask).logits
        report = handle.report()
        return logits, model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), report


def check_against_simulation(
    pools: Pools, folder: Path, plan: Plan, ids: Tensor, mask: Tensor, algorithm: str = "auto"
) -> list[dict[str, Any]]:
    plan.save(folder / "plan", overwrite=True)
    logits, text, report = simulated(folder, plan, ids, mask, algorithm)
    results: list[dict[str, Any]] = pools(plan.tp_size).run(on_rank, folder, folder / "plan", ids, mask, algorithm)
    for result in results:
        assert torch.equal(result["during"], logits)
        assert torch.equal(result["text"], text)
    first = results[0]["report"]
    assert (first.bits_per_value, first.wire_bytes_per_token) == (report.bits_per_value, report.wire_bytes_per_token)
    assert sum(result["report"].num_saturated for result in results) == report.num_saturated
    return results


@pytest.mark.parametrize(("algorithm", "world_size"), [("one_shot", 2), ("two_shot", 4)])
@pytest.mark.parametrize("name", CONFIGS)
def test_real_ranks_equal_the_simulation(
    ranks: Pools, tmp_path: Path, name: str, algorithm: str, world_size: int
) -> None:
    """Padding on the left, biases, a cache, tokens fewer than ranks (generate) and more."""
    folder = save_random(name, tmp_path / "model")
    ids, mask = random_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :5] = 0
    plan = narrowcast.calibrate(transformers.load(folder), [random_ids(8, 40, seed=1)], tp_size=world_size)
    check_against_simulation(ranks, folder, plan, ids, mask, algorithm)


@pytest.mark.parametrize("model", ["stories260K", "babyllama-tok105"])
def test_trained_models_in_fp32(ranks: Pools, shared: Path, tmp_path: Path, model: str) -> None:
    """Grouped-query attention, an indivisible vocabulary; at 1e-3 logits of up to 20 (fp32, other summation trees)."""
    folder = tmp_path / "model"
    folder.symlink_to(shared / "models" / model / "hf", target_is_directory=True)
    whole = transformers.load(folder)
    ids = random_ids(2, 24)
    plan = narrowcast.calibrate(whole, [random_ids(8, 40, seed=1)], tp_size=4)
    plan.save(tmp_path / "plan")
    logits, _, report = simulated(folder, plan, ids, torch.ones_like(ids), "auto")
    for result in ranks(4).run(on_rank, folder, tmp_path / "plan", ids, torch.ones_like(ids), "auto"):
        assert torch.allclose(result["during"], logits, atol=1e-3)
        assert result["report"].bits_per_value == report.bits_per_value


def test_uncompressed_sums_answer_as_transformers_own(ranks: Pools, tmp_path: Path) -> None:
    """Two ranks add two BF16 values: rounding once, in either order, is what gloo's sum does too."""
    folder = save_random("llama", tmp_path / "model")
    plan = narrowcast.calibrate(transformers.load(folder), [random_ids(2, 20)], tp_size=2, codec="bf16")
    ids = random_ids(3, 17)
    for result in check_against_simulation(ranks, folder, plan, ids, torch.ones_like(ids)):
        assert torch.equal(result["during"], result["before"])


def test_what_travels_is_counted_apart(ranks: Pools, tmp_path: Path) -> None:
    """Per token and rank of two: 4 sites of 96 features; one embedding row; half of 101 logits (51 at rank 0)."""
    folder = save_random("llama", tmp_path / "model")
    plan = narrowcast.calibrate(transformers.load(folder), [random_ids(2, 20)], tp_size=2, codec=EVERYWHERE)
    ids = random_ids(3, 17)
    report = check_against_simulation(ranks, folder, plan, ids, torch.ones_like(ids))[0]["report"]
    payload = 2 + 96 // 2  # one outlier in BF16, 95 codes of 4 bits
    assert report.num_tokens == 3 * 17
    assert report.wire_bytes_per_token == 4 * payload
    assert report.bits_per_value == 8 * payload / 96
    assert report.uncompressed_bytes_per_token == {"model.embed_tokens": 2 * 96, "lm_head": 2 * 51}


def test_the_bundled_model_sends_exactly_4_1875_bits(ranks: Pools) -> None:
    whole = transformers.load(MODEL)
    tokenizer = transformers.load_tokenizer(MODEL)
    text = (MODEL / "calibration.txt").read_text(encoding="utf8").split("\f")[:4]
    ids = [tokenizer(document, return_tensors="pt").input_ids[:, :64] for document in text]
    plan = narrowcast.calibrate(whole, ids, tp_size=2, codec=EVERYWHERE)
    with torch.no_grad(), narrowcast.attach(whole, plan, simulate=True) as handle:
        whole(ids[0])
    assert handle.report().bits_per_value == 4.1875


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random("llama", tmp_path_factory.mktemp("random") / "model")


def test_a_second_attach_is_refused_and_remove_restores(folder: Path) -> None:
    model = transformers.load(folder)
    forwards = [vars(module).get("forward") for module in model.modules()]
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2)
    with torch.no_grad():
        before = model(random_ids(1, 5)).logits
        handle = narrowcast.attach(model, plan, simulate=True)
        assert not torch.equal(model(random_ids(1, 5)).logits, before)
        for attempt in (
            lambda: narrowcast.attach(model, plan, simulate=True),
            lambda: narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2),
        ):
            with pytest.raises(InvalidInputError, match=r"has a plan attached. Call remove\(\)"):
                attempt()
        handle.remove()
        handle.remove()
        assert torch.equal(model(random_ids(1, 5)).logits, before)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    narrowcast.attach(model, plan, simulate=True).remove()


def test_a_whole_model_is_only_simulated(folder: Path) -> None:
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2)
    with pytest.raises(InvalidInputError, match="split by tp_size 2, found a whole one"):
        narrowcast.attach(model, plan)


def test_plans_for_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2)
    for name, seed, match in (("llama", 7, "weights that the plan was"), ("qwen3", 0, "model_type = 'llama'")):
        other = transformers.load(save_random(name, tmp_path / name, seed=seed))
        with pytest.raises(PlanMismatchError, match=match):
            narrowcast.attach(other, plan, simulate=True)
    model.config.rope_parameters["rope_theta"] *= 2
    with pytest.raises(PlanMismatchError, match=r"rope_theta = 10000.0, found 20000.0"):
        narrowcast.attach(model, plan, simulate=True)
    model.config.rope_parameters["rope_theta"] /= 2
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.mul_(1.5)
    with pytest.raises(PlanMismatchError, match=r"in model.layers.1.self_attn.o_proj, found others"):
        narrowcast.attach(model, plan, simulate=True)


def test_one_plan_serves_a_checkpoint_in_any_dtype_that_holds_it(folder: Path) -> None:
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2)
    narrowcast.attach(model.float(), plan, simulate=True).remove()


def attach_wrongly(folder: Path, plan: Path) -> str:
    model = transformers.load(folder, split=Split(tp_size=dist.get_world_size()))
    try:
        narrowcast.attach(model, Plan.load(plan))
    except InvalidInputError as error:
        return str(error)
    return "attached"


def test_a_plan_for_another_tp_size_is_refused_on_every_rank(ranks: Pools, folder: Path, tmp_path: Path) -> None:
    narrowcast.calibrate(transformers.load(folder), [random_ids(2, 20)], tp_size=4).save(tmp_path / "plan")
    for message in ranks(2).run(attach_wrongly, folder, tmp_path / "plan"):
        assert "tp_size 4, for which it was calibrated, found tp_size 2. Calibrate with tp_size 2" in message


def check_split(folder: Path, plan: Path) -> None:
    model = transformers.load(folder, split=Split(tp_size=2))
    with pytest.raises(InvalidInputError, match="a whole model to simulate on, found one split by tp_size 2"):
        narrowcast.attach(model, Plan.load(plan), simulate=True)
    forwards = forwards_of(model)
    with narrowcast.attach(model, Plan.load(plan)), pytest.raises(InvalidInputError, match="has a plan attached"):
        narrowcast.attach(model, Plan.load(plan))
    assert forwards_of(model) == forwards


def test_a_split_model_is_not_simulated(ranks: Pools, folder: Path, tmp_path: Path) -> None:
    narrowcast.calibrate(transformers.load(folder), [random_ids(2, 20)], tp_size=2).save(tmp_path / "plan")
    ranks(2).run(check_split, folder, tmp_path / "plan")


def check_token_ids(folder: Path) -> None:
    model = transformers.load(folder, split=Split(tp_size=2))
    plan = folder.parent / "plan"
    with narrowcast.attach(model, Plan.load(plan)), pytest.raises(IndexError, match="from -3 to 101 for a vocabulary"):
        model(torch.tensor([[5, -3, 101]]))


def test_token_ids_outside_the_vocabulary_are_no_zeros(ranks: Pools, folder: Path) -> None:
    narrowcast.calibrate(transformers.load(folder), [random_ids(2, 20)], tp_size=2).save(folder.parent / "plan")
    ranks(2).run(check_token_ids, folder)


def test_training_is_refused_and_inference_needs_no_care(folder: Path) -> None:
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2)
    with narrowcast.attach(model, plan, simulate=True):
        assert model(random_ids(1, 5)).logits.isfinite().all()
        model.train()
        with pytest.raises(InvalidInputError, match=r"found training.*model.eval\(\)"):
            model(random_ids(1, 5))
        with torch.no_grad():
            model(random_ids(1, 5))


def test_a_plan_is_a_plan(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"found 'x.plan'. Load it with Plan.load"):
        narrowcast.attach(transformers.load(folder), "x.plan", simulate=True)  # type: ignore[arg-type]


class Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=2))


def test_layers_that_compute_something_else_are_refused_by_name(folder: Path) -> None:
    model = transformers.load(folder)
    model.get_submodule("model.layers.1.mlp.down_proj").__class__ = Quantized
    with pytest.raises(InvalidInputError, match=r"found model.layers.1.mlp.down_proj of style 'rowwise' \(Quantized\)"):
        narrowcast.calibrate(model, [random_ids(1, 8)], tp_size=2)


class Codes(Tensor):
    """A tensor that stands for other values."""


def give_a_forward(layer: Any) -> None:
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight)


def give_codes(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Codes), requires_grad=False)


def offload(layer: Any) -> None:
    layer.to("meta")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (give_a_forward, "found another one at model.layers.1.mlp.down_proj"),
        (give_codes, "found Codes in model.layers.1.mlp.down_proj"),
        (offload, "found none of model.layers.1.mlp.down_proj.weight: offloaded"),
    ],
)
def test_layers_that_are_not_what_they_seem_are_refused_by_name(
    folder: Path, change: Callable[[Any], None], told: str
) -> None:
    plan = narrowcast.calibrate(transformers.load(folder), [random_ids(1, 8)], tp_size=2, codec="fp8")
    model = transformers.load(folder)
    change(model.get_submodule("model.layers.1.mlp.down_proj"))
    with pytest.raises(InvalidInputError, match=told):
        narrowcast.calibrate(model, [random_ids(1, 8)], tp_size=2)
    with pytest.raises(InvalidInputError, match=told):
        narrowcast.attach(model, plan, simulate=True)


def test_a_model_with_a_plan_is_not_copied(folder: Path) -> None:
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2)
    with torch.no_grad():
        plain = model(random_ids(1, 5)).logits
        handle = narrowcast.attach(model, plan, simulate=True)
        for part in (model, model.get_submodule("model.layers.0")):
            with pytest.raises(InvalidInputError, match=r"one that has a plan attached.*Copy it before"):
                copy.deepcopy(part)
        handle.suspend()
        again: Any = copy.deepcopy(model)
        handle.resume()
        assert torch.equal(again(random_ids(1, 5)).logits, plain)
        handle.remove()
        assert torch.equal(copy.deepcopy(model)(random_ids(1, 5)).logits, plain)


@torch.no_grad()
def test_weights_that_are_changed_under_a_plan_count(folder: Path) -> None:
    """In place: nothing is kept of a forward before, under a transform neither."""
    model, other = transformers.load(folder), transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 40)], tp_size=2, codec="transform(bits=4, axes=site)")
    with narrowcast.attach(model, plan, simulate=True), narrowcast.attach(other, plan, simulate=True):
        before = model(random_ids(1, 5)).logits
        for each in (model, other):
            each.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(2)  # type: ignore[operator, union-attr]
        changed = model(random_ids(1, 5)).logits
        assert torch.equal(other(random_ids(1, 5)).logits, changed) and not torch.equal(before, changed)


def check_heads(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"tp_size 3: .*found 4 heads, 4 KV heads: 1, 2 or 4 ranks"):
        transformers.load(folder, split=Split(tp_size=3))


def test_heads_that_cannot_be_shared_out_are_refused(ranks: Pools, folder: Path) -> None:
    ranks(3).run(check_heads, folder)


def refused_options(folder: Path, options: list[dict[str, Any]]) -> str:
    """What this rank is told, which attaches with options of its own."""
    model, plan = transformers.load(folder, split=Split(tp_size=2)), Plan.load(folder / "two.plan")
    try:
        narrowcast.attach(model, plan, **options[dist.get_rank()])
    except PlanMismatchError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        ({"feedback": True}, {"feedback": False}, "feedback of rank 1: expected that of rank 0, True, found False"),
        ({}, {"deterministic": True}, "deterministic of rank 1: expected that of rank 0, False, found True"),
        ({}, {"algorithm": "two_shot"}, "algorithm of rank 1: expected that of rank 0, auto, found two_shot"),
        (
            {"prompt_chunks": 2},
            {"prompt_chunks": 1},
            "prompt_chunks of rank 1: expected that of rank 0, halves from 32 tokens on, found one forward",
        ),
    ],
)
def test_ranks_with_other_options_are_told_which(
    ranks: Pools, tmp_path: Path, mine: dict[str, Any], theirs: dict[str, Any], told: str
) -> None:
    model = transformers.load(save_random("llama", tmp_path))
    narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=2, codec="int4-feature").save(tmp_path / "two.plan")
    first, second = ranks(2).run(refused_options, tmp_path, [mine, theirs])
    assert told in first and "rank 0" in second


def sampled(folder: Path, seeds: list[int]) -> tuple[list[int], float]:
    """Tokens, and a number drawn after them, of a rank that was seeded for itself."""
    torch.manual_seed(seeds[dist.get_rank()])
    model: Any = transformers.load(folder, split=Split(tp_size=2))
    with torch.no_grad(), narrowcast.attach(model, Plan.load(folder / "two.plan"), timeout_s=20):
        text = model.generate(random_ids(1, 8), max_new_tokens=20, do_sample=True)
        return text[0].tolist(), torch.rand(1).item()


def test_ranks_of_other_seeds_sample_the_same_text(ranks: Pools, tmp_path: Path) -> None:
    model = transformers.load(save_random("llama", tmp_path))
    narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=2, codec="int4-feature").save(tmp_path / "two.plan")
    first, second = ranks(2).run(sampled, tmp_path, [1, 2])
    assert first == second
    assert first[0] != ranks(2).run(sampled, tmp_path, [3, 4])[0][0], "rank 0's seed decides"
    alike = ranks(2).run(sampled, tmp_path, [5, 5])
    assert alike[0] == alike[1] != first


@pytest.mark.parametrize("timeout_s", [-1, 0, float("inf"), float("nan"), "60", True, 1e9])
def test_deadlines_that_are_none_are_refused_before_a_group_is_used(folder: Path, timeout_s: Any) -> None:
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 20)], tp_size=2, codec="fp8")
    with pytest.raises(InvalidInputError, match=r"timeout_s: expected seconds above 0.*Pass 60, say"):
        narrowcast.attach(model, plan, simulate=True, timeout_s=timeout_s)
    with pytest.raises(InvalidInputError, match="timeout_s"):
        narrowcast.launch.Ranks(1, timeout_s=timeout_s)
