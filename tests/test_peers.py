"""What benchmarks/peers/ writes for other engines: the weights of the folder that they are made from, and what is read
of their answers. No peer is needed.
"""

import importlib
import struct
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models import SMALL
from narrowcast.engines import load_engine

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
distributed_llama, distributed_llama_files, gguf_file = (
    importlib.import_module(f"peers.{name}") for name in ("distributed_llama", "distributed_llama_files", "gguf_file")
)

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 96, 160, 2, 101  # rows of whole blocks
BLOCK, CODES = 32, 16  # values of a block, and codes of a value, in Q4_0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, and fewer heads of keys than of queries."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"intermediate_size": INTERMEDIATE, "num_key_value_heads": 2})
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    """GGUF files of it, by format."""
    paths = {each: folder / f"{each}.gguf" for each in gguf_file.FORMATS}
    for kind, path in paths.items():
        gguf_file.write_gguf(folder, path, kind)
    return paths


def test_a_gguf_file_in_bf16_is_the_model_of_its_folder(folder: Path, files: dict[str, Path]) -> None:
    engine = load_engine()
    for found, weight in zip(engine.load(files["BF16"]).parameters(), engine.load(folder).parameters(), strict=True):
        assert torch.equal(found, weight)


@pytest.mark.parametrize(("kind", "steps"), [("Q4_0", 8), ("Q8_0", 127 * 2)])
def test_fewer_bits_lose_what_their_steps_lose(files: dict[str, Path], kind: str, steps: int) -> None:
    of_file = {each.name: each for each in gguf.GGUFReader(files[kind]).tensors}
    for exact in gguf.GGUFReader(files["BF16"]).tensors:
        weight, found = (gguf.dequantize(each.data, each.tensor_type) for each in (exact, of_file[exact.name]))
        if weight.ndim == 1:
            assert np.array_equal(found, weight)
            continue
        weight, found = weight.reshape(-1, BLOCK), found.reshape(-1, BLOCK)
        # A whole step at most for Q4_0, where the largest code is one short, half a step for Q8_0; and a scale in FP16.
        allowed = np.abs(weight).max(1, keepdims=True) * (1 / steps + 2.0**-11)
        assert (np.abs(found - weight) <= allowed).all()


def test_the_matrices_of_distributed_llama_are_those_of_q4_0(folder: Path, files: dict[str, Path]) -> None:
    path = folder / "model.m"
    distributed_llama_files.write_model(folder, path)
    written = path.read_bytes()
    magic, header_size = struct.unpack_from("<2i", written)
    assert (magic, header_size) == (0xA00ABCD, 8 + 16 * 8)
    header = dict(struct.iter_unpack("<2i", written[8:header_size]))
    assert header == {
        0: 0, 1: 0xABCD00, 2: HIDDEN, 3: INTERMEDIATE, 4: LAYERS, 5: 4, 6: 2, 7: 0, 8: 0, 9: VOCAB, 10: 128, 11: 1,
        12: 10000, 13: 2, 19: 24, 20: 6,
    }  # fmt: skip
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up", "attn_norm", "ffn_norm")
    layers = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in names]
    tensors = {each.name: each.data.tobytes() for each in gguf.GGUFReader(files["Q4_0"]).tensors}
    embedding = load_engine().load(folder, dtype="float32").get_input_embeddings().weight
    content = [embedding.detach().numpy().tobytes()]
    content += [tensors[f"{name}.weight"] for name in (*layers, "output_norm", "output")]
    assert written[header_size:] == b"".join(content)


def test_each_letter_of_a_prompt_is_a_token_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.t"
    distributed_llama_files.write_tokenizer(path, VOCAB)
    written = path.read_bytes()
    magic, place = struct.unpack_from("<2i", written)
    header, tokens = dict(struct.iter_unpack("<2i", written[8:place])), []
    while place < len(written):
        _, length = struct.unpack_from("<fI", written, place)
        tokens.append(written[place + 8 : place + 8 + length].decode())
        place += 8 + length
    assert magic == 0x567124
    assert header == {0: 1, 1: VOCAB, 2: max(map(len, tokens)), 3: VOCAB - 1, 9: 0, 10: 1}
    assert len(set(tokens)) == VOCAB
    text = distributed_llama_files.prompt(60)
    assert len(text) == 59 and set(text) < set(tokens)  # one more begins it
    assert not {"".join(pair) for pair in pairwise(chain(tokens[-1:], text))} & set(tokens)


def test_the_figures_of_distributed_llama_are_those_that_it_tells() -> None:
    said = """
🔶 Pred   29 ms Sync    0 ms | Sent     0 kB Recv     0 kB | [22660]

Evaluation
   nBatches: 32
    nTokens: 512
   tokens/s: 117.31 (8.52 ms/tok)
Prediction
    nTokens: 64
   tokens/s: 33.32 (30.01 ms/tok)
"""
    assert distributed_llama.mean_ms(said) == {"Evaluation": 8.52, "Prediction": 30.01}
    assert distributed_llama.mean_ms("🚨 Critical error: Cannot connect") == {}
