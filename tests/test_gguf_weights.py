"""GGUF files as weights: codes as the file has them, under the names and in the order of Transformers' parameters."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gguf_files import CONFIGS, SCALES, Kind, blocks, gguf, loaded, write_gguf
from narrowcast.engines import load_engine
from narrowcast.engines.transformers.files.checkpoints import open_checkpoint
from narrowcast.engines.transformers.files.gguf_model import knows
from narrowcast.errors import InvalidInputError, MissingDependencyError
from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.formats import Q4_0, Q4_1, Q8_0, GroupedCodes
from narrowcast.weights.gguf import GgufFile
from narrowcast.weights.quantize import quantize_int4, quantize_int8

LOSSLESS = {Kind.Q4_0: Q4_0, Kind.Q4_1: Q4_1, Kind.Q8_0: Q8_0, Kind.Q5_0: Q8_0}
REPACKED = [Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS]
# Each way into a model: in order, interleaved heads, embedding, with types that are kept, rounded, repacked, plain.
MIXED = {
    "token_embd.weight": Kind.Q8_0,
    "output.weight": Kind.Q5_1,
    "blk.0.attn_q.weight": Kind.Q4_1,
    "blk.1.attn_q.weight": Kind.BF16,
    "blk.0.attn_k.weight": Kind.Q5_0,
    "blk.0.attn_v.weight": Kind.F16,
    "blk.0.ffn_down.weight": Kind.Q4_K,
    "blk.1.ffn_down.weight": Kind.Q6_K,
}


def write_matrix(folder: Path, x_NK: Tensor | None, kind: Kind, name: str = "x") -> GgufFile:
    """A file with one matrix: 20 rows of 512 random columns where none is given."""
    if x_NK is None:
        x_NK = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    data = blocks(kind, *x_NK.shape) if kind in SCALES else gguf.quants.quantize(x_NK.numpy(), kind)
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(folder / "x.gguf")


def dequantized(file: GgufFile) -> Tensor:
    """The values of the matrix, by the package."""
    (tensor,) = gguf.GGUFReader(file.header.path).tensors
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("kind", [*LOSSLESS, Kind.Q4_K, *REPACKED], ids=lambda kind: kind.name)
def test_values_are_those_of_the_package(tmp_path: Path, kind: Kind) -> None:
    file = write_matrix(tmp_path, None, kind)
    expected = dequantized(file)
    assert torch.equal(file.values("x"), expected)
    assert torch.equal(file.values("x", slice(3, 17), slice(32, 352)), expected[3:17, 32:352])
    assert file.values("x", slice(5, 5)).shape == (0, 512)


@pytest.mark.parametrize("kind", LOSSLESS, ids=lambda kind: kind.name)
def test_codes_are_kept(tmp_path: Path, kind: Kind) -> None:
    file = write_matrix(tmp_path, None, kind)
    assert file.format("x") == LOSSLESS[kind] == file.codes("x").format
    assert torch.equal(file.codes("x").dequantized(), dequantized(file))
    assert len(file.notes) == (kind.name == "Q5_0")


def test_scales_and_minima_of_q4_k_are_rounded_to_fp16(tmp_path: Path) -> None:
    file = write_matrix(tmp_path, None, Kind.Q4_K)
    assert file.format("x") == Q4_1
    found, exact = file.codes("x"), dequantized(file)
    assert found.offsets is not None
    bound = (15 * found.scales.float() + found.offsets.float().abs()) * 2**-11 + 2**-24
    assert ((found.dequantized() - exact).abs().view(20, -1, 32) <= bound[..., None]).all()
    assert "scales and minima rounded to FP16" in file.notes[0]


@pytest.mark.parametrize("kind", REPACKED, ids=lambda kind: kind.name)
def test_other_types_are_repacked_to_8_bits(tmp_path: Path, kind: Kind) -> None:
    """Half a step of largest / 127, and the scale's rounding to FP16, 127 steps * 2 ** -11."""
    file = write_matrix(tmp_path, None, kind)
    exact = dequantized(file).view(20, -1, 32)
    bound = exact.abs().amax(-1, keepdim=True) / 127 * (0.5 + 127 * 2**-11) + 2**-24
    assert file.format("x") == Q8_0
    assert ((file.codes("x").dequantized().view(20, -1, 32) - exact).abs() <= bound).all()
    assert file.notes[0].startswith(f"{kind.name} is repacked to int8-group32") and "(1 tensor)" in file.notes[0]


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_a_part_is_a_part_of_the_whole(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks of 256 columns are cut, and where rows are read in several chunks."""
    file = write_matrix(tmp_path, None, kind)
    whole = file.codes("x")
    monkeypatch.setattr("narrowcast.weights.gguf.CHUNK", 1024)
    for rows, columns in [(ALL, slice(32, 480)), (slice(7, 19), slice(256, None)), (slice(4), slice(512, 512))]:
        part = file.codes("x", rows, columns)
        assert torch.equal(part.codes, whole.codes[rows, columns])
        assert torch.equal(part.dequantized(), whole.dequantized()[rows, columns])
    assert file.codes("x", slice(5, 5), slice(64, 64)).codes.shape == (0, 0)
    with pytest.raises(InvalidInputError, match="whole groups of 32, found 16 to 512"):
        file.codes("x", slice(0, 1), slice(16, None))


@pytest.mark.parametrize(("kind", "quantize"), [(Kind.Q4_0, quantize_int4), (Kind.Q8_0, quantize_int8)])
def test_quantizing_is_that_of_the_package(
    tmp_path: Path, kind: Kind, quantize: Callable[[Tensor], GroupedCodes]
) -> None:
    """Bit for bit, with ties, zeros, and scales that FP16 cannot hold. Of 3 groups a row: no multiple of 64 columns."""
    torch.manual_seed(0)
    x_NK = torch.randn(64, 96) * 10.0 ** torch.randint(-6, 8, (64, 1))
    x_NK[0] = 0
    x_NK[1] = torch.randint(-8, 9, (96,)) / 8
    x_NK[2, ::2] = -x_NK[2, 1::2]
    x_NK[3] = -0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of overflowing scales
        kept = write_matrix(tmp_path, x_NK, kind).codes("x")
    made = quantize(x_NK)
    assert torch.equal(made.codes, kept.codes)
    assert torch.equal(made.scales.view(torch.int16), kept.scales.view(torch.int16))
    assert torch.equal(quantize(x_NK.bfloat16()).codes, quantize(x_NK.bfloat16().float()).codes)
    for odd in (torch.nan, torch.inf, -torch.inf):
        x_NK[5, 40] = odd
        decoded = quantize(x_NK).dequantized()[5]
        assert decoded[32:64].isnan().all() and decoded[:32].isfinite().all() and decoded[64:].isfinite().all()
    with pytest.raises(InvalidInputError, match="a multiple of 32 columns"):
        quantize(x_NK[:, :80])


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_that_transformers_unpacks(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, name, Kind.Q4_0, MIXED)
    assert knows(path)
    checkpoint, expected = open_checkpoint(path), loaded(path)
    assert set(checkpoint.names) == expected.keys()
    for key, value in expected.items():
        assert checkpoint.shape(key) == value.shape
        assert torch.equal(checkpoint.values(key).float(), value)
        part = slice(len(value) // 3, len(value) // 2 + 1)
        assert torch.equal(checkpoint.values(key, part).float(), value[part])
        if checkpoint.format(key):
            codes = checkpoint.codes(key, part, slice(32, 96)).dequantized()
            assert torch.equal(codes, checkpoint.codes(key).dequantized()[part, 32:96])
            assert (codes - value[part, 32:96]).abs().max() <= value.abs().max() / 225
    assert {note.split()[0] for note in checkpoint.notes} <= {"Q5_1", "Q5_0", "Q4_K", "Q6_K"}
    assert any("Q4_K" in note and note.endswith("(1 tensor)") for note in checkpoint.notes)


def test_config_tokenizer_and_chat_template_come_with_the_file(tmp_path: Path) -> None:
    words = ["<s>", "</s>", "Ġ", "a", "b", "ab", "Ġab", *(f"<extra{number}>" for number in range(94))]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(5e5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(words)
        writer.add_token_types([3, 3] + [1] * 99)
        writer.add_token_merges(["a b", "Ġ ab"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ bos_token }}{% for each in messages %}{{ each['content'] }}{% endfor %}")

    write_gguf(tmp_path / "model.gguf", "llama", Kind.Q4_0, add=add)
    assert knows(tmp_path / "model.gguf")
    engine = load_engine()
    tokenizer = engine.load_tokenizer(tmp_path / "model.gguf")
    assert tokenizer("ab ab")["input_ids"] == [5, 6] and tokenizer.eos_token_id == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<s>ab"
    config = engine.skeleton(tmp_path / "model.gguf").config
    assert (config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (2, 5e5)


def test_other_architectures_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", Kind.Q4_0)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"mamba"))
    assert not knows(path)
    with pytest.raises(InvalidInputError, match=r"a model of llama, .* found mamba\. Use a folder"):
        open_checkpoint(path)
    path.write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xy.weight"))
    assert not knows(path)
    with pytest.raises(InvalidInputError, match=r"qwen3moe, .* found llama with blk\.0\.ffn_xy\.weight"):
        open_checkpoint(path)


def test_positions_are_scaled_as_the_file_says(tmp_path: Path) -> None:
    """Llama 3.1's are, and Transformers' own loader of GGUF files leaves that out."""
    path, divisors = tmp_path / "model.gguf", torch.linspace(1, 8, 12)
    write_gguf(path, "llama", Kind.Q4_0, add=lambda writer: writer.add_tensor("rope_freqs.weight", divisors.numpy()))
    scaled = load_engine().load(path).model.rotary_emb
    plain = type(scaled)(scaled.config)

    assert knows(path) and "rope_freqs.weight" not in open_checkpoint(path).names
    assert torch.equal(scaled.inv_freq, plain.inv_freq / divisors)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_are_scaled_linearly_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"

    def scaled(kind: gguf.RopeScalingType) -> None:
        write_gguf(
            path,
            name,
            Kind.Q4_0,
            add=lambda writer: (writer.add_rope_scaling_type(kind), writer.add_rope_scaling_factor(8.0))[0],
        )

    scaled(gguf.RopeScalingType.LINEAR)
    parameters = load_engine().load(path).config.rope_parameters
    whole = parameters.get("full_attention", parameters)
    assert (whole["rope_type"], whole["factor"]) == ("linear", 8.0)
    scaled(gguf.RopeScalingType.YARN)
    with pytest.raises(InvalidInputError, match="found scaling yarn"):
        load_engine().load(path)


def test_plain_tensors_keep_their_dtype(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write_gguf(path, "qwen2", Kind.BF16, {"blk.0.attn_v.weight": Kind.F16, "blk.0.ffn_up.weight": Kind.F32})
    checkpoint, expected = open_checkpoint(path), model.state_dict()
    for name, dtype in {
        "self_attn.q_proj.weight": torch.bfloat16,
        "self_attn.v_proj.weight": torch.float16,
        "mlp.up_proj.weight": torch.float32,
        "self_attn.q_proj.bias": torch.float32,
    }.items():
        value = checkpoint.values(f"model.layers.0.{name}")
        assert value.dtype == dtype and torch.equal(value, expected[f"model.layers.0.{name}"].to(dtype))
    assert not any(map(checkpoint.format, checkpoint.names))


def test_the_package_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", Kind.Q4_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"narrowcast\[gguf\]"):
        open_checkpoint(tmp_path / "model.gguf")


def test_types_that_the_package_cannot_unpack_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", torch.zeros(2, 292, dtype=torch.uint8).numpy(), raw_dtype=Kind.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidInputError, match="types that the package gguf can unpack, found Q8_K of x"):
        GgufFile(tmp_path / "x.gguf")
