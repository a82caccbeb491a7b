"""Files of weights that are cut off, altered or lie: one clear error, or values; never a crash, a hang, much memory."""

import json
import random
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from narrowcast.engines.transformers.files.checkpoints import open_checkpoint
from narrowcast.errors import InvalidInputError
from narrowcast.weights.checkpoint import Checkpoint
from narrowcast.weights.folders.kernels import METHOD, VERSION
from narrowcast.weights.folders.writing import Source, write
from narrowcast.weights.formats import GroupedCodes
from test_weights import FORMATS, random_codes

PACKED = sorted((Path(__file__).parent / "packed").glob("*.safetensors"))
U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
HUGE = 2**64 - 1


def read_all(checkpoint: Checkpoint) -> None:
    """Everything, whole and in part; shapes are those that were told."""
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        assert checkpoint.values(name).shape == shape
        if checkpoint.format(name):
            assert checkpoint.codes(name).codes.shape == shape
            assert checkpoint.codes(name, slice(1, 3)).codes.shape[1] == shape[1]


def is_read(path: Path) -> bool:
    """True if everything in it is read; False for the error that tells why not, in a sentence."""
    try:
        read_all(open_checkpoint(path))
    except InvalidInputError as error:
        assert "expected" in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


def altered(data: bytes, count: int, within: int) -> Iterator[bytes]:
    """Copies with one to four bytes changed, or an integer of 4 or 8 bytes, mostly where the header is."""
    dice = random.Random(0)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 4))):
            place = dice.randrange(within if dice.random() < 0.9 else len(data))
            new = dice.choice(
                (dice.randbytes(1), b"\0", b"\xff", U32(dice.randrange(64)), U64(HUGE >> dice.randrange(64)))
            )
            changed[place : place + len(new)] = new
        yield bytes(changed[: len(data)])


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a vocabulary and most ways to a parameter."""
    from gguf_files import Kind, write_gguf

    def add(writer: object) -> None:
        writer.add_token_list(["a", "b", "c"])  # type: ignore[attr-defined]
        writer.add_token_scores([0.0, 1.0, 2.0])  # type: ignore[attr-defined]

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(
        path, "llama-tied", Kind.Q8_0, {"blk.0.ffn_down.weight": Kind.Q6_K, "blk.0.ffn_up.weight": Kind.Q4_0}, add
    )
    return path


def size_of_header(data: bytes) -> int:
    return data.rindex(b"output_norm.weight") + 40


def test_a_gguf_file_may_be_cut_off_anywhere(gguf_file: Path, tmp_path: Path) -> None:
    data, path = gguf_file.read_bytes(), tmp_path / "cut.gguf"
    header = size_of_header(data)
    for length in [*range(0, header, 7), *range(header, len(data) - 64, len(data) // 50)]:
        path.write_bytes(data[:length])
        assert not is_read(path), length


def test_bytes_of_a_gguf_file_may_be_any(gguf_file: Path, tmp_path: Path) -> None:
    data, path = gguf_file.read_bytes(), tmp_path / "altered.gguf"
    assert is_read(gguf_file)
    num_read = 0
    for changed in altered(data, 400, size_of_header(data)):
        path.write_bytes(changed)
        num_read += is_read(path)
    assert 20 < num_read < 380


def text(value: bytes) -> bytes:
    return U64(len(value)) + value


def gguf_bytes(keys: bytes = b"", num_keys: int = 0, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    architecture = text(b"general.architecture") + U32(8) + text(b"llama")
    head = b"GGUF" + U32(3) + U64(num_tensors) + U64(num_keys + 1) + architecture + keys + tensors
    return head + bytes(-len(head) % 32 + 1000)


def entry(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"x") -> bytes:
    return text(name) + U32(len(dims)) + b"".join(map(U64, dims)) + U32(kind) + U64(offset)


LIES = {
    "another file": (b"PK\3\4" + bytes(100), "a GGUF file, found one that begins with b'PK"),
    "version": (b"GGUF" + U32(1) + bytes(100), "GGUF version 2 or 3, little-endian, found 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(100), "GGUF version 2 or 3, little-endian, found 50331648"),
    "numbers of tensors": (b"GGUF" + U32(3) + U64(HUGE) + U64(0) + bytes(100), "tensors, 1048576 at most"),
    "numbers of keys": (b"GGUF" + U32(3) + U64(0) + U64(HUGE) + bytes(100), "keys, 1048576 at most"),
    "a key's length": (gguf_bytes(U64(HUGE), 1), "the end of the file"),
    "a key that is no text": (gguf_bytes(text(b"\xff\xfe") + U32(4) + U32(1), 1), "words in UTF-8"),
    "an unknown type of value": (gguf_bytes(text(b"k") + U32(13), 1), "values of the types 0 to 12, found type 13"),
    "a long array of numbers": (gguf_bytes(text(b"k") + U32(9) + U32(10) + U64(HUGE), 1), "the end of the file"),
    "a long array of words": (gguf_bytes(text(b"k") + U32(9) + U32(8) + U64(HUGE), 1), "words, 16777216 at most"),
    "arrays in arrays": (
        gguf_bytes(text(b"k") + U32(9) + (U32(9) + U64(1)) * 60, 1),
        "arrays of numbers or words, found one of type 9",
    ),
    "a key twice": (gguf_bytes((text(b"k") + U32(4) + U32(1)) * 2, 2), "each key once, found 'k' twice"),
    "alignment 0": (
        gguf_bytes(text(b"general.alignment") + U32(4) + U32(0), 1, entry([4]), 1),
        "a power of 2 for general.alignment, found 0",
    ),
    "alignment 3": (
        gguf_bytes(text(b"general.alignment") + U32(4) + U32(3), 1, entry([4]), 1),
        "a power of 2 for general.alignment, found 3",
    ),
    "alignment in words": (
        gguf_bytes(text(b"general.alignment") + U32(8) + text(b"32"), 1, entry([4]), 1),
        "a power of 2 for general.alignment, found 32",
    ),
    "no dimensions": (gguf_bytes(tensors=entry([]), num_tensors=1), "1 to 4 dimensions of 'x', found 0"),
    "5 dimensions": (gguf_bytes(tensors=entry([1] * 5), num_tensors=1), "1 to 4 dimensions of 'x', found 5"),
    "2 ** 32 - 1 dimensions": (
        gguf_bytes(tensors=text(b"x") + U32(2**32 - 1), num_tensors=1),
        "1 to 4 dimensions of 'x', found 4294967295",
    ),
    "dimension 0": (gguf_bytes(tensors=entry([4, 0]), num_tensors=1), "whole blocks of 1, found shape (0, 4)"),
    "dimensions whose product overflows": (
        gguf_bytes(tensors=entry([2**32, 2**32]), num_tensors=1),
        "found a file of 1128 bytes",
    ),
    "dimensions beyond the file": (
        gguf_bytes(tensors=entry([1024, 1024]), num_tensors=1),
        "4194304 bytes of 'x' at 128, found a file of 1128 bytes",
    ),
    "an offset beyond the file": (
        gguf_bytes(tensors=entry([4], offset=2**40), num_tensors=1),
        "16 bytes of 'x' at 1099511627904",
    ),
    "an offset that overflows": (
        gguf_bytes(tensors=entry([4], offset=HUGE - 15), num_tensors=1),
        "16 bytes of 'x' at 18446744073709551728",
    ),
    "an unknown type": (
        gguf_bytes(tensors=entry([256], kind=1000), num_tensors=1),
        "types that the package gguf knows, found type 1000 of x",
    ),
    "blocks that are cut": (
        gguf_bytes(tensors=entry([33, 2], kind=2), num_tensors=1),
        "'x' in whole blocks of 32, found shape (2, 33)",
    ),
    "a tensor twice": (gguf_bytes(tensors=entry([4]) * 2, num_tensors=2), "each tensor once, found 'x' twice"),
    "a part of several": (
        gguf_bytes(text(b"split.count") + U32(2) + struct.pack("<H", 2), 1),
        "one GGUF file, found one of 2 parts",
    ),
    "many layers": (
        gguf_bytes(text(b"llama.block_count") + U32(4) + U32(2**31), 1, entry([4], name=b"output_norm.weight"), 1),
        "2147483648 layers, as it says, found tensors of 0",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_gguf_files_are_told_without_memory(tmp_path: Path, lie: str) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    path = tmp_path / "lie.gguf"
    data, told = LIES[lie]
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError, match=re.escape(told)):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def folder_of(path: Path, tmp_path: Path) -> Path:
    """A folder with a layer that a package has packed."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        quantization = json.loads(file.metadata()["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}), encoding="utf8")
    parts = {f"up.{name}": tensor for name, tensor in load_file(path).items() if name != "expected"}
    save_file(parts | {"norm.weight": torch.ones(4).bfloat16()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("path", PACKED, ids=lambda path: path.stem)
def test_bytes_of_a_folder_may_be_any(path: Path, tmp_path: Path) -> None:
    folder = folder_of(path, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    assert is_read(folder)
    for length in [*range(0, header, 11), *range(header, len(data), 97)]:
        (folder / "model.safetensors").write_bytes(data[:length])
        assert not is_read(folder)
    num_read = 0
    for changed in altered(data, 200, header):
        (folder / "model.safetensors").write_bytes(changed)
        num_read += is_read(folder)
    assert num_read < 150
    (folder / "model.safetensors").write_bytes(data)
    config = (folder / "config.json").read_bytes()
    for changed in altered(config, 200, len(config)):
        (folder / "config.json").write_bytes(changed)
        is_read(folder)


@pytest.fixture(scope="module")
def mapped_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the kernels' layout, with a matrix of each format, and a norm."""
    folder, codes = tmp_path_factory.mktemp("mapped"), {}
    for form in FORMATS:
        codes[form.name] = random_codes(form, 20, 2 * form.group_size, form.scale_dtypes[-1])
    sources = [Source(name, tuple(each.codes.shape), rows_of(each)) for name, each in codes.items()]
    write(
        folder / "model.safetensors", [*sources, Source("norm", (4,), torch.ones(4).__getitem__)], {"a": ["0"]}, [1.5]
    )
    config = {"quantization_config": {"quant_method": METHOD, "version": VERSION}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    for name, each in codes.items():
        assert torch.equal(open_checkpoint(folder).values(name), each.dequantized())
    return folder


def rows_of(codes: GroupedCodes) -> Callable[[slice], GroupedCodes]:
    return lambda rows: codes.rows(torch.arange(len(codes.codes))[rows])


def test_bytes_of_a_mapped_folder_may_be_any(mapped_folder: Path, tmp_path: Path) -> None:
    data, header = altered_in(mapped_folder, tmp_path)
    assert is_read(tmp_path)
    for length in [*range(0, header, 17), *range(header, len(data), 997)]:
        (tmp_path / "model.safetensors").write_bytes(data[:length])
        assert not is_read(tmp_path)
    num_read = 0
    for changed in altered(data, 400, header):
        (tmp_path / "model.safetensors").write_bytes(changed)
        num_read += is_read(tmp_path)
    assert 5 < num_read < 300
    (tmp_path / "model.safetensors").write_bytes(data)
    config = (tmp_path / "config.json").read_bytes()
    for changed in altered(config, 200, len(config)):
        (tmp_path / "config.json").write_bytes(changed)
        is_read(tmp_path)


def altered_in(folder: Path, tmp_path: Path) -> tuple[bytes, int]:
    """A copy of a folder to alter; the bytes of its file, and how many of these are its header."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = (folder / "model.safetensors").read_bytes()
    return data, 8 + struct.unpack("<Q", data[:8])[0]


LIES_OF_MAPPED = {
    "another format": (
        '"format": "int4-group32"',
        '"format": "int3-group32"',
        "format, shape and scales of int4-group32",
    ),
    "cut groups": ('"shape": [20, 64]', '"shape": [20, 63]', "format, shape and scales of int4-group32"),
    "no rows": ('"shape": [20, 64]', '"shape": [-1, 64]', "format, shape and scales of int4-group32"),
    "more rows": ('"shape": [20, 64]', '"shape": [48, 64]', "U8 (3, 1, 576), found ('U8', (2, 1, 576))"),
    "many rows": ('"shape": [20, 64]', '"shape": [9999999999999, 64]', "U8 (625000000000, 1, 576)"),
    "other scales": ('"bf16_scales": false', '"bf16_scales": true', "scales of int4-group32 in torch.float16"),
    "an infinite scale": ('"scale": 1.0', '"scale": 9e999', "format, shape and scales of int4-group32"),
    "a matrix that is not there": ('"int4-group32": {', '"x": {', "x of U8"),
    "a matrix without a word": (
        '"int4-group32": {',
        '"norm": 1, "int4-group32": {',
        "format, shape and scales of norm",
    ),
    "no digests": ('"digests"', '"digest"', "a dict of digests, found a NoneType"),
    "digests of another kind": ('["0"]', "[0]", "lists of digests"),
    "divisors of nothing": ("[1.5]", "[0.0]", "frequency divisors, positive numbers"),
    "another place": ("", " ", "int4-group32 at a multiple of 64 bytes, found 1 bytes behind one"),
}


@pytest.mark.parametrize("lie", LIES_OF_MAPPED)
def test_lies_of_mapped_folders_are_told(mapped_folder: Path, tmp_path: Path, lie: str) -> None:
    data, header = altered_in(mapped_folder, tmp_path)
    true, false, told = LIES_OF_MAPPED[lie]
    words = data[8:header].rstrip().replace(*(json.dumps(each)[1:-1].encode() for each in (true, false)), 1)
    words += b" " * ((-(8 + len(words)) % 64) + (lie == "another place"))
    (tmp_path / "model.safetensors").write_bytes(U64(len(words)) + words + data[header:])
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        open_checkpoint(tmp_path)


def tensor(dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return U64(len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        U64(2**62) + b"{}",
        U64(99_000_000) + b"{}",
        U64(100_000) + b"[" * 100_000,
        tensor("F32", [2**33, 2**33], [0, 64]),
        tensor("F32", [16], [0, 2**60]),
        tensor("F32", [16], [64, 0]),
        tensor("F32", [17], [0, 64]),
        tensor("F33", [16], [0, 64]),
        tensor("F32", [-16], [0, 64]),
    ],
)
def test_lies_of_safetensors_are_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf8")
    (tmp_path / "model.safetensors").write_bytes(data)
    assert not is_read(tmp_path)
