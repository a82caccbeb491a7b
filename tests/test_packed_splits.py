"""Models in few bits over ranks and stages, with a vocabulary that is shared or whole: the simulation's answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gguf_files
import narrowcast
from gguf_files import Kind
from models import random_ids
from narrowcast import Plan
from narrowcast.engines.base import Replicated, Weights
from narrowcast.plan.split import Split
from narrowcast.weights.layers import PackedEmbedding, PackedLinear
from ranks import Ranks
from test_packed_models import load, saved, w4a16
from transports import needs_mesh

Pools = Callable[[int], Ranks]

# A file whose matrices differ in their types, as in Q4_K_M; the output layer has another one than the embedding.
MIXED = {
    "blk.0.attn_v.weight": Kind.Q8_0,
    "blk.0.ffn_down.weight": Kind.Q6_K,
    "blk.1.attn_k.weight": Kind.Q4_1,
    "blk.1.ffn_up.weight": Kind.F16,
    "token_embd.weight": Kind.Q5_0,
    "output.weight": Kind.Q8_0,
}


def a_model(name: str, folder: Path) -> Path:
    """One of test_packed_models, of compressed-tensors, or a file."""
    folder.mkdir()
    if name.endswith(".gguf"):
        gguf_files.write_gguf(folder / name, name.removesuffix(".gguf"), Kind.Q4_0, MIXED)
        return folder / name
    return w4a16(folder) if name == "w4a16" else saved(name, folder)


def answers(model: Any, plan: Plan, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), narrowcast.attach(model, plan, **options):
        text = model.generate(ids, max_new_tokens=6, do_sample=False)
        return model(ids).logits, text


def on_rank(path: Path, plan: Path, ids: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    found = Plan.load(plan)
    model = load(path, split=found.split, **options)
    rows = [each.matrix.shape[0] for each in model.modules() if isinstance(each, PackedEmbedding)]
    return rows, *answers(model, found, ids)


def check(pools: Pools, path: Path, split: Split, weights: Weights, **options: Any) -> list[list[int]]:
    """Real ranks against the simulation; the rows of embeddings in few bits that each rank holds."""
    model, ids = load(path, weights), random_ids(2, 9)
    sizes = {"tp_size": split.tp_size, "pp_size": split.pp_size}
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", **sizes)
    plan.save(path.parent / "plan")
    logits, text = answers(model, plan, ids, simulate=True)
    found = pools(split.world_size).run(on_rank, path, path.parent / "plan", ids, {"weights": weights, **options})
    for _, *real in found:
        assert torch.equal(real[0], logits)
        assert torch.equal(real[1], text)
    return [rows for rows, *_ in found]


@needs_mesh
@pytest.mark.parametrize("split", [Split(pp_size=2), Split(tp_size=2, pp_size=2)], ids=str)
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama", "int4-group32"),
        ("llama-tied", "int8-group32"),
        ("gemma2", "int8-group32"),  # tied, scaled embeddings
        ("w4a16", "stored"),
        ("qwen3.gguf", "stored"),
        ("qwen3.gguf", "int4-group32"),
        ("qwen3-moe", "int4-group32"),
        ("qwen3moe.gguf", "stored"),
    ],
)
def test_stages_answer_like_the_simulation(
    ranks: Pools, tmp_path: Path, name: str, weights: Weights, split: Split
) -> None:
    check(ranks, a_model(name, tmp_path / "model"), split, weights)


@needs_mesh
@pytest.mark.parametrize("replicated", ["embedding", "all"])
@pytest.mark.parametrize(
    ("name", "weights", "rows"),
    [("llama-tied", "int4-group32", 101), ("gemma3", "int8-group32", 101), ("qwen3.gguf", "stored", 101)],
)
def test_a_vocabulary_in_few_bits_may_be_whole_on_every_rank(
    ranks: Pools, tmp_path: Path, name: str, weights: Weights, rows: int, replicated: Replicated
) -> None:
    path = a_model(name, tmp_path / "model")

    assert check(ranks, path, Split(tp_size=2), weights, replicated=replicated) == [[rows]] * 2


def test_a_file_with_matrices_of_several_types_keeps_each_in_its_own(tmp_path: Path) -> None:
    path = a_model("qwen3.gguf", tmp_path / "model")
    stored, quantized = load(path, "stored"), load(path, "int4-group32")

    def format_of(model: Any, name: str) -> str:
        layer = model.get_submodule(name)
        return layer.matrix.format.name if isinstance(layer, PackedLinear | PackedEmbedding) else "values"

    for name, expected in {
        "model.layers.0.self_attn.q_proj": "int4-group32",
        "model.layers.0.self_attn.v_proj": "int8-group32",
        "model.layers.0.mlp.down_proj": "int8-group32",
        "model.layers.1.self_attn.k_proj": "int4-group32-minimum",
        "model.embed_tokens": "int8-group32",
        "lm_head": "int8-group32",
    }.items():
        assert format_of(stored, name) == format_of(quantized, name) == expected, name
    assert format_of(stored, "model.layers.1.mlp.up_proj") == "values"
    assert format_of(quantized, "model.layers.1.mlp.up_proj") == "int4-group32", "which makes such of values alone"
