"""Folders of safetensors as weights: plain ones, and those that AWQ, GPTQ and compressed-tensors have packed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from narrowcast.engines.transformers.files.checkpoints import open_checkpoint
from narrowcast.errors import InvalidInputError
from narrowcast.weights.checkpoint import ALL, Checkpoint
from narrowcast.weights.formats import Q8_0, GroupedCodes, w4a16

PACKED = sorted((Path(__file__).parent / "packed").glob("*.safetensors"))
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "sym": False, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "sym": False, "desc_act": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"},
                "input_activations": None,
            }
        },
    },
}


def write(folder: Path, tensors: Mapping[str, Tensor], quantization: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf8")
    return folder


def words(codes: Tensor, order: list[int] | None = None) -> Tensor:
    """Codes of 4 bits, 8 of the last dimension in an int32, as the formats' descriptions say."""
    runs = codes.to(torch.int64).unflatten(-1, (-1, 8))[..., order or list(range(8))]
    return (runs << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def random_codes(num_rows: int, num_columns: int, group_size: int) -> GroupedCodes:
    torch.manual_seed(0)
    groups = (num_rows, num_columns // group_size)
    return GroupedCodes(
        w4a16(group_size),
        torch.randint(0, 16, (num_rows, num_columns), dtype=torch.uint8),
        torch.rand(groups).half(),
        torch.randint(0, 16, groups, dtype=torch.uint8),
    )


def awq(weight: GroupedCodes) -> dict[str, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": words(weight.codes.T, order),
        "qzeros": words(weight.offsets.T, order),
        "scales": weight.scales.T,
    }


def gptq(weight: GroupedCodes, offset: int = 1) -> dict[str, Tensor]:
    zeros = (weight.offsets.T.to(torch.int64) - offset) % 16
    order = torch.arange(weight.codes.shape[1]) // weight.format.group_size
    padded = torch.nn.functional.pad(zeros, (0, -zeros.shape[1] % 8))
    return {
        "qweight": words(weight.codes).T,
        "qzeros": words(padded),
        "scales": weight.scales.T,
        "g_idx": order.to(torch.int32),
    }


def compressed(weight: GroupedCodes) -> dict[str, Tensor]:
    padded = torch.nn.functional.pad(weight.offsets.T, (0, -weight.offsets.shape[0] % 8))
    return {
        "weight_packed": words(weight.codes),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
        "weight_zero_point": words(padded).T,
    }


PACKERS: dict[str, Callable[[GroupedCodes], dict[str, Tensor]]] = {
    "awq": awq,
    "gptq": gptq,
    "gptq_v2": lambda weight: gptq(weight, offset=0),
    "compressed-tensors": compressed,
}


def pack(folder: Path, method: str, weight: GroupedCodes, **changes: object) -> Path:
    """A folder with the layer `up`, its bias, and a plain `norm.weight`."""
    parts = {f"up.{part}": tensor for part, tensor in PACKERS[method](weight).items()}
    plain = {"up.bias": torch.ones(8, dtype=torch.float16), "norm.weight": torch.ones(8)}
    return write(folder, parts | plain, CONFIGS[method] | changes)


def equal(found: GroupedCodes, expected: GroupedCodes) -> bool:
    offsets = [each.offsets for each in (found, expected)]
    return (
        found.format == expected.format
        and torch.equal(found.codes, expected.codes)
        and torch.equal(found.scales, expected.scales)
        and (offsets == [None, None] or torch.equal(*offsets))
    )


@pytest.mark.parametrize("path", PACKED, ids=lambda path: path.stem)
def test_files_of_the_packages_are_what_those_say(tmp_path: Path, path: Path) -> None:
    """Packed by GPTQModel 7.6.0 and compressed-tensors 0.20.0, with the values that were packed."""
    with safe_open(path, "pt") as file:
        quantization = json.loads(file.metadata()["quantization_config"])
    parts = load_file(path)
    expected = parts.pop("expected")
    folder = write(tmp_path / "model", {f"up.{part}": tensor for part, tensor in parts.items()}, quantization)
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.names) == ["up.weight"] and checkpoint.shape("up.weight") == expected.shape
    assert checkpoint.format("up.weight") == (Q8_0 if "8-bits" in path.stem else w4a16(32))
    assert torch.equal(checkpoint.codes("up.weight").dequantized(), expected)
    assert torch.equal(checkpoint.values("up.weight", slice(3, 13), slice(32, 64)), expected[3:13, 32:64])


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("num_rows", "num_columns", "group_size"), [(16, 96, 32), (40, 256, 128), (24, 160, 160)])
def test_packed_layers_are_read_in_parts(
    tmp_path: Path, method: str, num_rows: int, num_columns: int, group_size: int
) -> None:
    weight = random_codes(num_rows, num_columns, group_size)
    checkpoint = open_checkpoint(pack(tmp_path, method, weight))
    assert set(checkpoint.names) == {"up.weight", "up.bias", "norm.weight"}
    assert checkpoint.format("up.bias") is None and checkpoint.notes == ()
    assert equal(checkpoint.codes("up.weight"), weight)
    for rows in (slice(3, 13), slice(8, None), slice(5, 5)):
        assert equal(checkpoint.codes("up.weight", rows), weight.rows(torch.arange(num_rows)[rows]))
        part = checkpoint.codes("up.weight", rows, slice(0, group_size))
        assert equal(part, weight.rows(torch.arange(num_rows)[rows]).columns(0, group_size))
    with pytest.raises(InvalidInputError, match=f"whole groups of {group_size}, found 0 to 16 of"):
        checkpoint.codes("up.weight", ALL, slice(0, 16))


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "compressed-tensors"])
def test_rows_need_not_fill_words(tmp_path: Path, method: str) -> None:
    weight = random_codes(21, 64, 32)
    assert equal(open_checkpoint(pack(tmp_path, method, weight)).codes("up.weight"), weight)


def test_groups_of_other_sizes_and_orders_are_refused_by_name(tmp_path: Path) -> None:
    weight = random_codes(16, 96, 32)
    parts = gptq(weight)

    def refused(match: str, **changes: Tensor) -> None:
        tensors = {f"up.{part}": tensor for part, tensor in {**parts, **changes}.items()}
        with pytest.raises(InvalidInputError, match=match):
            open_checkpoint(write(tmp_path, tensors, CONFIGS["gptq"]))

    refused("columns in the order of activations, up.g_idx. Use .* desc_act=False", g_idx=parts["g_idx"].flip(0))
    refused(
        r"groups of 32, 64, ... columns in up, found 2 of 96", qzeros=parts["qzeros"][:2], scales=parts["scales"][:2]
    )
    refused(r"expected up.scales of F16 or BF16 \(3, 16\), found \('F32'", scales=parts["scales"].float())
    refused(r"expected up.qzeros of I32 \(3, 2\), found \('I32', \(3, 1\)\)", qzeros=parts["qzeros"][:, :1])


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("awq", {"version": "gemv"}, "version gemm, found gemv"),
        ("awq", {"bits": 8}, "bits 4, found 8"),
        ("gptq", {"bits": 3}, "bits 4 or 8, found 3"),
        ("gptq", {"bits": 4.0}, "bits 4 or 8, found 4.0"),
        ("gptq", {"bits": 8, "sym": False}, "8 bits: sym True, found False"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format gptq or gptq_v2, found marlin"),
        ("compressed-tensors", {"format": "float-quantized"}, "format pack-quantized, found float-quantized"),
        ("compressed-tensors", {"config_groups": {"0": {"weights": {"num_bits": 8}}}}, "num_bits 4, found 8"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme None, found {'num_bits': 8}"),
        ("awq", {"quant_method": "fp8"}, "plain weights, or those of awq, gptq, compressed-tensors, found quant.* fp8"),
        ("awq", {"quant_method": "bitsandbytes"}, "found quantization bitsandbytes"),
        ("awq", {"quant_method": ["awq"]}, "found quantization"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    tmp_path: Path, method: str, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        open_checkpoint(pack(tmp_path, method, random_codes(16, 64, 32), **changes))


def test_8_bits_with_zero_points_elsewhere_are_refused(tmp_path: Path) -> None:
    parts = {
        "up.qweight": torch.zeros(8, 4, dtype=torch.int32),
        "up.qzeros": torch.full((1, 1), 0x7F7F7F7E, dtype=torch.int32),
        "up.scales": torch.ones(1, 4).half(),
    }
    checkpoint = open_checkpoint(write(tmp_path, parts, CONFIGS["gptq"] | {"bits": 8, "sym": True}))
    assert checkpoint.codes("up.weight", slice(1, 4)).dequantized().eq(-128).all()
    with pytest.raises(InvalidInputError, match="8 bits: zero points in up in the middle, found others"):
        checkpoint.codes("up.weight")


def shards(folder: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A plain folder with a file for each tensor."""
    files = {name: f"{name}.safetensors" for name in tensors}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf8")
    (folder / "config.json").write_text("{}", encoding="utf8")
    return open_checkpoint(folder)


def test_plain_folders_are_read_in_parts_from_one_file_or_several(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(6, 8).bfloat16(),
        "b": torch.randn(5).half(),
        "c": torch.randn(3, 4, 6),
        "d": torch.tensor(2.0),
    }
    one = open_checkpoint(write(tmp_path / "one", tensors))
    (tmp_path / "many").mkdir()
    for checkpoint in (one, shards(tmp_path / "many", tensors)):
        assert set(checkpoint.names) == tensors.keys()
        for name, tensor in tensors.items():
            assert checkpoint.format(name) is None and checkpoint.shape(name) == tensor.shape
            assert checkpoint.values(name).dtype == tensor.dtype and torch.equal(checkpoint.values(name), tensor)
        assert torch.equal(checkpoint.values("a", slice(2, 100), slice(1, -1)), tensors["a"][2:, 1:-1])
        assert torch.equal(checkpoint.values("b", slice(2, 4)), tensors["b"][2:4])
        assert torch.equal(checkpoint.values("c", slice(1, 2), slice(3, 6)), tensors["c"][1:2, :, 3:])


def test_other_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"a": torch.ones(2).to(torch.float8_e4m3fn)}))
    with pytest.raises(InvalidInputError, match="a in BF16, FP16 or FP32, found F8_E4M3"):
        checkpoint.values("a")


def test_missing_and_wrong_files_are_told(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(InvalidInputError, match=match):
            open_checkpoint(tmp_path)

    with pytest.raises(InvalidInputError, match="a folder or a GGUF file, found neither"):
        open_checkpoint(tmp_path / "nowhere")
    refused(r"config\.json: expected a file that can be read, found no such file")
    (tmp_path / "config.json").write_text("[" * 100_000, encoding="utf8")
    refused(r"config\.json: expected JSON")
    (tmp_path / "config.json").write_text("[]", encoding="utf8")
    refused(r"config\.json: expected a JSON object, found a list")
    (tmp_path / "config.json").write_text("{}", encoding="utf8")
    refused(r"expected model\.safetensors or model\.safetensors\.index\.json, found neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(r"found pytorch_model\.bin\. Save the model as safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    for content, match in {
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}': r"2\.safetensors: .* found no such file",
        '{"weight_map": {"b": "1.safetensors"}}': r"1\.safetensors: expected b, as the index has it",
        '{"weight_map": {"a": "../1.safetensors"}}': "names of files beside it, found '../1.safetensors'",
        '{"weight_map": {"a": 1}}': "weight_map, file names by tensors",
        "{}": "weight_map, file names by tensors",
    }.items():
        (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf8")
        refused(match)
