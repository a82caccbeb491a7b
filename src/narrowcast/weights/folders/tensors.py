"""The tensors of a folder: one safetensors file, or several with an index. Mapped: only what is asked for is read."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.mapped import MappedFile
from narrowcast.weights.parts import span
from narrowcast.weights.refusals import broken, unserved

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_NBYTES_OF_JSON = 1 << 28
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its first byte, dtype as safetensors names it, and shape."""

    file: MappedFile
    start: int
    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """Tensors by name. InvalidInputError for a folder without them, and for files that are missing or broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: Mapping[str, Entry] = {}
        if (folder / SINGLE).is_file():
            self._entries = _opened(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._entries = _sharded(folder, read_json(folder / INDEX).get("weight_map"))
        else:
            others = sorted(
                path.name for pattern in ("*.safetensors", "*.bin", "*.pt*") for path in folder.glob(pattern)
            )
            raise unserved(
                folder, f"{SINGLE} or {INDEX}", others[0] if others else "neither", "Save the model as safetensors."
            )

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """As safetensors names it: BF16, I32."""
        return self._entries[name].dtype

    def start(self, name: str) -> int:
        """The place of its first byte in its file."""
        return self._entries[name].start

    def file(self, name: str) -> MappedFile:
        """The one that a tensor is in."""
        return self._entries[name].file

    def take_apart(self, name: str, parts: Sequence[str]) -> None:
        """Let as many runs of a tensor's rows, all its dimensions but the last one, be matrices by these names, too."""
        entry = self._entries[name]
        *outer, width = entry.shape
        shape = prod(outer) // len(parts), width
        nbytes = prod(shape) * DTYPES[entry.dtype].itemsize
        entries = (replace(entry, start=entry.start + place * nbytes, shape=shape) for place in range(len(parts)))
        self._entries = {**self._entries, **dict(zip(parts, entries, strict=True))}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A part of a tensor, one of `DTYPES`, in its own memory: rows of the first dimension, columns of the last."""
        entry = self._entries[name]
        dtype = DTYPES[entry.dtype]
        *outer, width = entry.shape or (1,)
        if not outer:
            rows, columns = ALL, rows
        bytes_NKb = self._bytes(entry).view(*outer, width, dtype.itemsize)
        (top, bottom), (left, right) = span(rows, outer[0] if outer else 1), span(columns, width)
        part = bytes_NKb[top:bottom] if outer else bytes_NKb
        found = part[..., left:right, :].clone(memory_format=torch.contiguous_format).view(dtype)[..., 0]
        if part.is_contiguous():
            entry.file.forget(part, everywhere=False)
        return found.view(()) if not entry.shape else found

    def view(self, name: str) -> Tensor | None:
        """A tensor, one of `DTYPES`, where it lies in its file; None if that is no place for it."""
        entry = self._entries[name]
        dtype = DTYPES[entry.dtype]
        return None if entry.start % dtype.itemsize else self._bytes(entry).view(dtype).view(entry.shape)

    def _bytes(self, entry: Entry) -> Tensor:
        return entry.file.bytes[entry.start :][: prod(entry.shape) * DTYPES[entry.dtype].itemsize]


def metadata(path: Path) -> Mapping[str, str]:
    """The words that a file has beside its tensors."""
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def _sharded(folder: Path, files_of: object) -> dict[str, Entry]:
    """The tensors in an index, each in its file."""
    index = folder / INDEX
    if not isinstance(files_of, dict) or not all(isinstance(file, str) for file in files_of.values()):
        raise broken(index, "weight_map, file names by tensors", type(files_of).__name__)
    opened: dict[str, Mapping[str, Entry]] = {}
    for name, file in files_of.items():
        if Path(file).name != file:
            raise broken(index, "names of files beside it", repr(file))
        if file not in opened:
            opened[file] = _opened(folder / file)
        if name not in opened[file]:
            raise broken(folder / file, f"{name}, as the index has it", "a file without it")
    return {name: opened[file][name] for name, file in files_of.items()}


def _opened(path: Path) -> dict[str, Entry]:
    """The tensors in a file, whose header safetensors has found to be in order."""
    try:
        checked: Any = safe_open(path, framework="np")  # that of torch fails on files that are larger than memory
        slices = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118
        file = MappedFile(path)
        size = int.from_bytes(file.bytes[:8].numpy().tobytes(), "little")
        header = json.loads(file.bytes[8 : 8 + size].numpy().tobytes())
    except SafetensorError as error:
        raise broken(path, "a safetensors file", str(error)) from error
    except OSError as error:
        raise broken(path, "a file that can be read", (error.strerror or str(error)).lower()) from error
    return {
        name: Entry(file, 8 + size + header[name]["data_offsets"][0], each.get_dtype(), tuple(each.get_shape()))
        for name, each in slices.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; InvalidInputError if there is none."""
    try:
        if (size := path.stat().st_size) > MAX_NBYTES_OF_JSON:
            raise broken(path, "JSON of a model", f"{size} bytes")
        found = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise broken(path, "a file that can be read", (error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        raise broken(path, "JSON", "something else") from error
    if not isinstance(found, dict):
        raise broken(path, "a JSON object", f"a {type(found).__name__}")
    return found
