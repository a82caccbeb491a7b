"""GGUF files as MODEL: the weights of the folder that they were made from, whole and on ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import random_ids, save_random
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError, MissingDependencyError
from narrowcast.plan.split import Split
from ranks import Ranks

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of queries and keys in the order of llama.cpp: the halves that rotate together, in turns."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, as Transformers saves it and as a GGUF file beside it."""
    path = save_random("llama", tmp_path_factory.mktemp("llama"))
    model = load_engine().load(path)
    config = model.config
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in model.state_dict().items():
        name, weight = key.removesuffix(".weight"), value.float()
        if name.endswith(("q_proj", "k_proj")):
            weight = interleaved(weight, config.num_attention_heads)
        prefix, _, inner = name.removeprefix("model.layers.").partition(".")
        stored = NAMES[name] if name in NAMES else f"blk.{prefix}.{NAMES[inner]}"
        writer.add_tensor(f"{stored}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(random_ids(2, 9)).logits
    return found


def test_a_file_is_the_model_that_it_was_made_of(folder: Path) -> None:
    engine = load_engine()
    found = engine.load(folder / "model.gguf")
    assert {each.dtype for each in found.parameters()} == {torch.bfloat16}
    wide = engine.load(folder / "model.gguf", dtype="float32").parameters()
    assert all(
        each.dtype == torch.float32 and torch.equal(each, of_file)
        for each, of_file in zip(wide, found.parameters(), strict=True)
    )
    assert torch.equal(logits(found), logits(engine.load(folder)))
    assert engine.fingerprint(found).samples == engine.fingerprint(engine.load(folder)).samples
    assert sum(each.numel() for each in engine.skeleton(folder / "model.gguf").parameters()) == sum(
        each.numel() for each in found.parameters()
    )


def on_rank(path: Path) -> Tensor:
    return logits(load_engine().load(path, split=Split(tp_size=dist.get_world_size())))


def test_ranks_take_their_parts_of_a_file(ranks: Callable[[int], Ranks], folder: Path) -> None:
    for of_file, of_folder in zip(
        ranks(2).run(on_rank, folder / "model.gguf"), ranks(2).run(on_rank, folder), strict=True
    ):
        assert torch.equal(of_file, of_folder)


def test_a_missing_file_and_a_missing_package_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine()
    for read in (engine.load, engine.skeleton, engine.load_tokenizer):
        with pytest.raises(InvalidInputError, match=r"^model \S*nowhere\.gguf: expected .*, found no such file"):
            read(folder / "nowhere.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for read in (engine.load, engine.skeleton, engine.load_tokenizer):
        with pytest.raises(MissingDependencyError, match=r"narrowcast\[gguf\]"):
            read(folder / "model.gguf")
