"""Configs that claim other models than their files hold: refused at once, whatever is asked of them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from models import save_random
from narrowcast.engines import load_engine
from narrowcast.engines.base import Weights
from narrowcast.engines.transformers.files.claims import check_shapes
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Split

USES: dict[str, Callable[[Path], Any]] = {
    "stored": lambda path: load_engine().load(path),
    "int8-group32": lambda path: load_engine().load(path, weights="int8-group32"),
    "split": lambda path: load_engine().load(path, split=Split(tp_size=2)),
    "skeleton": lambda path: load_engine().skeleton(path),
}
WEIGHTS: list[Weights] = ["stored", "int8-group32"]


def claiming(folder: Path, **fields: Any) -> Path:
    config = save_random("llama", folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 10**9}, {"text_config": {"num_local_experts": 10**9}}], ids=["layers", "experts"]
)
def test_no_more_modules_are_made_than_a_model_has(tmp_path: Path, use: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"4096 layers or experts at most, found num_.* 1000000000"):
        USES[use](claiming(tmp_path, **fields))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("use", USES)
def test_a_gguf_file_has_as_many_layers_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    import gguf_files

    path = tmp_path / "model.gguf"
    add = gguf_files.gguf.GGUFWriter.add_block_count
    monkeypatch.setattr(gguf_files.gguf.GGUFWriter, "add_block_count", lambda writer, _: add(writer, 10**9))
    gguf_files.write_gguf(path, "gemma3", gguf_files.Kind.Q8_0)

    with pytest.raises(InvalidInputError, match="1000000000 layers, as it says, found tensors of 2"):
        USES[use](path)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "fields",
    [{"vocab_size": 10**12}, {"intermediate_size": 10**12}, {"head_dim": 10**9}, {"hidden_size": 192}],
    ids=str,
)
def test_shapes_are_compared_before_anything_is_allocated(
    tmp_path: Path, weights: Weights, fields: dict[str, int]
) -> None:
    with pytest.raises(
        InvalidInputError, match=r"weight of shape \(\d+, \d+\), as its config says, found \(\d+, \d+\)"
    ):
        load_engine().load(claiming(tmp_path, **fields), weights=weights)


@pytest.mark.parametrize("count", [0, 1])
def test_no_layer_of_the_files_is_left_out(tmp_path: Path, count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"as its config says, found model.layers.{count}.input_layernorm"):
        load_engine().load(claiming(tmp_path, num_hidden_layers=count))
    with pytest.raises(InvalidInputError, match=f"of its config has, found model.layers.{count}.input_layernorm"):
        load_engine().load(tmp_path, weights="int8-group32")


def test_layers_that_the_engine_knows_to_do_without_may_be_left_out() -> None:
    """As DeepSeek-V3's that predicts a second token."""
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    names = ["layers.0.weight", "layers.1.weight"]
    with pytest.raises(InvalidInputError, match=r"found layers\.1\.weight"):
        check_shapes("m", model, names, lambda _: (2, 2))
    model._keys_to_ignore_on_load_unexpected = [r"layers\.1.*"]
    check_shapes("m", model, names, lambda _: (2, 2))


def test_layers_that_cannot_be_in_few_bits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 80, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, head_dim=32, vocab_size=50, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_engine().load(tmp_path, weights="int4-group32")

    assert "self_attn.q_proj and 5 more stay in values, as their columns are no multiple of 32" in caplog.text
    assert sum(isinstance(each, nn.Linear) for each in model.modules()) == 6
    with torch.no_grad():
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
