"""A vocabulary that every rank keeps whole: nothing of it travels, the answers are the same, memory is as was said."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import narrowcast
from commands import save_plan, typed
from conftest import MODEL
from models import random_ids, save_random
from narrowcast import Plan
from narrowcast.codecs import CastCodec
from narrowcast.engines import Replicated, load_engine, replication
from narrowcast.engines.base import Vocabulary
from narrowcast.engines.replication import ORDER, allowed, free_nbytes, limits
from narrowcast.engines.transformers.sharding import local
from narrowcast.errors import PlanMismatchError
from narrowcast.plan import ModelFingerprint, Site
from narrowcast.plan.decisions import Decisions
from narrowcast.plan.split import Split
from ranks import Ranks
from transports import needs_mesh

Pools = Callable[[int], Ranks]

FAMILIES = ["llama", "llama-tied", "gemma2", "phi3", "qwen3-moe"]
MADE_OF = {"none": {"embedding", "logits"}, "embedding": {"logits"}, "all": set()}


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_few_bits_are_few_bytes(tmp_path: Path, name: str) -> None:
    engine = load_engine()
    dense = engine.vocabulary(engine.skeleton(save_random(name, tmp_path)).bfloat16())
    kept = dense.kept_in(engine.matrices(tmp_path, weights="int8-group32"))

    assert dense.kept_in(engine.matrices(tmp_path)).output == dense.output
    assert dense.kept_in(engine.matrices(tmp_path)).embedding == dense.embedding
    assert kept.output == 112 * 128 * 34 // 32  # rows in blocks of 16, columns of 64
    assert kept.embedding == (kept.output if dense.tied else dense.embedding)


def held(model: Any) -> int:
    """Bytes of weights, each once."""
    return sum({id(weight): local(weight).nbytes for weight in model.parameters()}.values())


def answers(model: Any, plan: Plan, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor, set[str]]:
    """Logits, a greedy text, and the kinds that travelled besides sums."""
    with torch.no_grad(), narrowcast.attach(model, plan, **options) as handle:
        logits = model(ids, use_cache=False).logits
        text = model.generate(ids, max_new_tokens=6, do_sample=False)
        kinds = load_engine().sites(model, plan.split) if not options else {}
        return logits, text, {kinds[name] for name in handle.report().sites if name in kinds} - {"sum", "gather"}


def on_rank(folder: Path, ids: Tensor, replicated: Replicated) -> tuple[Any, ...]:
    plan = Plan.load(folder / "plan")
    model = load_engine().load(folder, split=plan.split, replicated=replicated)
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
    return held(model), alone, *answers(model, plan, ids)


def planned(folder: Path, name: str, split: Split) -> tuple[Any, Plan]:
    model = load_engine().load(save_random(name, folder))
    options = {"tp_size": split.tp_size, "pp_size": split.pp_size, "experts": split.experts}
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int8-feature", **options)
    plan.save(folder / "plan")
    return model, plan


@needs_mesh
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("replicated", ["embedding", "all"])
def test_answers_are_the_simulated_ones(ranks: Pools, tmp_path: Path, name: str, replicated: Replicated) -> None:
    model, plan = planned(tmp_path, name, Split(tp_size=2))
    ids = random_ids(2, 9)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    logits, text, _ = answers(model, plan, ids, simulate=True)
    plain = ranks(2).run(on_rank, tmp_path, ids, "none")
    kept = ranks(2).run(on_rank, tmp_path, ids, replicated)
    added = load_engine().vocabulary(load_engine().skeleton(tmp_path).bfloat16()).added(replicated, 2)
    for (without, *_), (with_it, alone, *found) in zip(plain, kept, strict=True):
        assert torch.equal(found[0], logits) and torch.equal(found[1], text)
        assert found[2] == MADE_OF[replicated]
        assert torch.allclose(alone, whole, atol=0.05), "the engine's own answer"
        assert abs(with_it - without - added) <= 2 * 101 * 96, "up to the rows that ranks cannot share out evenly"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("llama", Split(tp_size=2, pp_size=2)),
        ("llama-tied", Split(tp_size=2, pp_size=2)),
        ("mixtral", Split(tp_size=2, experts="all_reduce")),
        ("qwen3-moe", Split(tp_size=2, experts="all_to_all")),
    ],
)
def test_stages_and_whole_experts_have_it_too(ranks: Pools, tmp_path: Path, name: str, split: Split) -> None:
    model, plan = planned(tmp_path, name, split)
    ids = random_ids(2, 9)
    logits, text, _ = answers(model, plan, ids, simulate=True)
    for _, _, *found in ranks(split.world_size).run(on_rank, tmp_path, ids, "embedding"):
        assert torch.equal(found[0], logits) and torch.equal(found[1], text)


# What is kept whole where that is left to us.

SIZES = Vocabulary(all=1000, embedding=200, output=200, tied=False)
SLOW, FAST = (Decisions(weights_gbps=1.0, logits_s=seconds) for seconds in (101e-9, 99e-9))


def a_plan(decisions: Decisions = Decisions(), *coded: str, tp_size: int = 2) -> Plan:
    site = {kind: Site(kind=kind, codecs=(CastCodec(dtype=torch.bfloat16),), error={}) for kind in coded}
    model = ModelFingerprint(config={}, samples={})
    return Plan(split=Split(tp_size=tp_size), model=model, calibration={}, sites=site, decisions=decisions)


@pytest.mark.parametrize(
    ("plan", "free", "expected"),
    [
        (a_plan(), 2400, "embedding"),  # two ranks hold 600 each, at most half of what is free
        (a_plan(), 2399, "none"),
        (a_plan(SLOW), 2800, "all"),
        (a_plan(SLOW), 2799, "embedding"),
        (a_plan(FAST), 9999, "embedding"),  # logits are there before 100 bytes more are read
        (a_plan(SLOW, "embedding"), 9999, "none"),
        (a_plan(SLOW, "logits"), 9999, "embedding"),
        (a_plan(SLOW, tp_size=1), 9999, "none"),
    ],
)
def test_the_embedding_where_memory_allows_the_output_layer_where_the_link_pays(
    plan: Plan, free: int, expected: str
) -> None:
    assert allowed(SIZES, [plan], free, 2) == expected
    assert allowed(SIZES, [plan, a_plan(FAST)], free, 2) == min(expected, "embedding", key=ORDER.index)


def test_a_matrix_that_serves_twice_is_held_once() -> None:
    tied = Vocabulary(all=800, embedding=200, output=200, tied=True)
    assert (tied.added("embedding", 2), tied.added("all", 2), SIZES.added("all", 2)) == (100, 100, 200)
    assert allowed(tied, [a_plan(SLOW)], 2000, 2) == "all"


def test_limits_of_control_groups_old_and_new(tmp_path: Path) -> None:
    own, mounted = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("4:memory:/a/b\n3:cpu:/\n0::/service\n")
    files = {"memory/a/memory.limit_in_bytes": "300", "memory.max": "200", "service/memory.max": "max"}
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(f"{text}\n")
    assert sorted(limits(own, mounted)) == [200, 300]
    (mounted / "memory.current").write_text("150\n")
    (mounted / "memory.stat").write_text("anon 90\ninactive_file 40\nactive_file 10\n")
    assert sorted(limits(own, mounted)) == [100, 300], "what is taken but for files in the cache"
    assert 0 < free_nbytes() < 1 << 50


def test_without_limits_memory_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /sys/fs/cgroup is not mounted."""
    monkeypatch.setattr(replication, "limits", lambda *_: iter(()))
    assert 0 < free_nbytes() < 1 << 50


def agreed(folder: Path, free: Sequence[int]) -> Replicated:
    replication.free_nbytes = lambda: free[dist.get_rank()]  # type: ignore[assignment]
    return replication.affordable(load_engine(), folder, [Plan.load(folder / "plan")])


def test_ranks_take_what_all_of_them_can_hold(ranks: Pools, tmp_path: Path) -> None:
    planned(tmp_path, "llama", Split(tp_size=2))
    assert ranks(2).run(agreed, tmp_path, [1 << 30, 1 << 30]) == ["embedding"] * 2
    assert ranks(2).run(agreed, tmp_path, [1 << 30, 1 << 10]) == ["none"] * 2


def test_a_plan_that_codes_what_would_not_travel_is_refused(ranks: Pools, tmp_path: Path) -> None:
    model = load_engine().load(save_random("llama", tmp_path))
    codecs = {"sum": "int8-feature", "embedding": "int8-group128"}
    narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=2, codec=codecs).save(tmp_path / "plan")
    with pytest.raises(PlanMismatchError, match=r'embed_tokens ranks share out.*Load it with replicated="none"'):
        ranks(2).run(on_rank, tmp_path, random_ids(1, 4), "embedding")


def test_generate_says_what_is_whole(tmp_path: Path) -> None:
    plan = save_plan(tmp_path / "plan", "int8-feature")
    options = "generate", MODEL, "--plan", plan, "--prompt", "It was", "--max-new-tokens", 2, "--replicate"
    said = {asked: typed(*options, asked) for asked in ("auto", "none", "all")}
    assert len({done.stdout for done in said.values()}) == 1
    assert "embedding whole on every rank" in said["auto"].stderr
    assert "embedding and output layer whole on every rank" in said["all"].stderr
    assert "every rank" not in said["none"].stderr and "embed_tokens" in said["none"].stderr
    assert typed(*options, "some").returncode == 2
