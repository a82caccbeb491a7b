"""The header of a GGUF file: its numbers and words, and where its tensors lie. Nothing in it is believed.

Layout, little-endian: "GGUF", version (u32), number of tensors and of keys (u64); for each key its name (length as u64,
bytes), the type of its value (u32), the value; for each tensor its name, number of dimensions (u32), those (u64,
columns first), type (u32), offset (u64) from the data, which begin at the next multiple of `general.alignment`.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from narrowcast.errors import InvalidInputError, MissingDependencyError
from narrowcast.weights.gguf.blocks import OTHER_FILE, block_size
from narrowcast.weights.refusals import broken, unserved

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
MAX_DIMS = 4
MAX_ENTRIES = 1 << 20  # of keys, of tensors
MAX_STRINGS = 1 << 24  # in an array
MAX_NAME_NBYTES = 1 << 10
MAX_EXPERTS = 1 << 12
EXPERTS = "_exps.weight"  # of all experts in one tensor


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a file: its shape as PyTorch has it, its type, its place in bytes from the file's beginning."""

    shape: tuple[int, ...]
    type: Any
    start: int
    nbytes: int

    @property
    def num_rows(self) -> int:
        """All dimensions but the last one."""
        return prod(self.shape[:-1])


@dataclass(frozen=True)
class Header:
    """`metadata`: numbers and words by key, without arrays. `entries`: tensors by name.

    One that holds a matrix of each expert is as many, by the names that llama.cpp gave them before: of
    `blk.0.ffn_up_exps.weight` the first is `blk.0.ffn_up.0.weight`.
    """

    path: Path
    metadata: Mapping[str, int | float | str]
    entries: Mapping[str, Entry]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it: llama, qwen2, gemma3."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """The words of a key that must be there."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise broken(self.path, f"words for {key}", value)
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """The whole number above zero of a key that must be there, unless there is a default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or value <= 0:
            raise broken(self.path, f"a number above 0 for {key}", value)
        return value


def read_header(path: Path) -> Header:
    """The header, checked: every tensor lies in the file. InvalidInputError for anything else."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise broken(path, "a GGUF file", f"{size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, _Cursor(path, data))
    except OSError as error:
        raise broken(path, "a file that can be read", (error.strerror or str(error)).lower()) from error


class _Cursor:
    """A place in the bytes of a file, which moves on with all that is read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    @property
    def num_left(self) -> int:
        return len(self.data) - self.place

    def skip(self, num_bytes: int) -> int:
        """Move on; the place before."""
        if num_bytes > self.num_left:
            raise self.wrong(f"{num_bytes} bytes at {self.place}", f"{self.num_left}, the end of the file")
        place, self.place = self.place, self.place + num_bytes
        return place

    def number(self, kind: str) -> Any:
        place = self.skip(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self.data, place)[0]

    def count(self, subject: str, most: int) -> int:
        count: int = self.number("Q")
        if count > min(most, self.num_left):  # each takes a byte or more
            raise self.wrong(f"{subject}, {most} at most, within the file", count)
        return count

    def text(self) -> str:
        length = self.number("Q")
        place = self.skip(length)
        try:
            return self.data[place : place + length].decode("utf8")
        except UnicodeDecodeError:
            raise self.wrong("words in UTF-8", f"other bytes at {place}") from None

    def name(self) -> str:
        place, name = self.place, self.text()
        if not 0 < len(name) < MAX_NAME_NBYTES:
            raise self.wrong("a name", f"{len(name)} letters at {place}")
        return name

    def wrong(self, expected: object, found: object) -> InvalidInputError:
        return broken(self.path, expected, found)


def _header(path: Path, cursor: _Cursor) -> Header:
    place = cursor.skip(len(MAGIC))
    if (magic := cursor.data[place : place + len(MAGIC)]) != MAGIC:
        raise broken(path, "a GGUF file", f"one that begins with {magic!r}")
    if (version := cursor.number("I")) not in VERSIONS:
        raise broken(path, f"GGUF version {VERSIONS[0]} or {VERSIONS[1]}, little-endian", version)
    num_tensors, num_keys = cursor.count("tensors", MAX_ENTRIES), cursor.count("keys", MAX_ENTRIES)
    metadata: dict[str, int | float | str | None] = {}
    for _ in range(num_keys):
        name = cursor.name()
        if name in metadata:
            raise broken(path, "each key once", f"{name!r} twice")
        metadata[name] = _value(cursor, cursor.number("I"))
    known = {name: value for name, value in metadata.items() if value is not None}
    if (num_parts := known.get("split.count", 1)) not in (0, 1):
        raise InvalidInputError(
            f"file {path}",
            expected="a model in one GGUF file",
            found=f"one of {num_parts} parts",
            remedy="Join them: llama-gguf-split --merge FIRST_PART OUTPUT.",
        )
    return Header(path, known, _entries(cursor, num_tensors, _alignment(cursor, known)))


def _value(cursor: _Cursor, kind: int) -> int | float | str | None:
    """A value; None for an array, over which the cursor only moves on."""
    if kind in SCALARS:
        number: int | float = cursor.number(SCALARS[kind])
        return number
    if kind == STRING:
        return cursor.text()
    if kind != ARRAY:
        raise cursor.wrong("values of the types 0 to 12", f"type {kind}")
    if (inner := cursor.number("I")) in SCALARS:
        cursor.skip(cursor.number("Q") * struct.calcsize(f"<{SCALARS[inner]}"))
    elif inner == STRING:
        for _ in range(cursor.count("words", MAX_STRINGS)):
            cursor.skip(cursor.number("Q"))
    else:
        raise cursor.wrong("arrays of numbers or words", f"one of type {inner}")
    return None


def _alignment(cursor: _Cursor, metadata: Mapping[str, int | float | str]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(found, int) or found <= 0 or found & (found - 1):
        raise cursor.wrong("a power of 2 for general.alignment", found)
    return found


def _entries(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, Entry]:
    found: dict[str, tuple[tuple[int, ...], Any, int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.name()
        if name in found:
            raise cursor.wrong("each tensor once", f"{name!r} twice")
        if not 1 <= (num_dims := cursor.number("I")) <= MAX_DIMS:
            raise cursor.wrong(f"1 to {MAX_DIMS} dimensions of {name!r}", num_dims)
        shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
        kind, nbytes = _size(cursor, name, shape, cursor.number("I"))
        found[name] = shape, kind, nbytes, cursor.number("Q")
    data = -(-cursor.place // alignment) * alignment
    size = len(cursor.data)
    for name, (_, _, nbytes, offset) in found.items():
        if data + offset + nbytes > size:
            raise cursor.wrong(f"{nbytes} bytes of {name!r} at {data + offset}", f"a file of {size} bytes")
    entries: dict[str, Entry] = {}
    for name, (shape, kind, nbytes, offset) in found.items():
        whole = Entry(shape=shape, type=kind, start=data + offset, nbytes=nbytes)
        for part, entry in _by_expert(cursor, name, whole).items():
            if part in entries:
                raise cursor.wrong("each tensor once", f"{part!r} twice")
            entries[part] = entry
    return entries


def _by_expert(cursor: _Cursor, name: str, whole: Entry) -> dict[str, Entry]:
    """The matrices of experts in a tensor of several; any other as it is."""
    if not name.endswith(EXPERTS) or len(whole.shape) != 3:
        return {name: whole}
    num_experts, *shape = whole.shape
    if num_experts > MAX_EXPERTS:
        raise cursor.wrong(f"{MAX_EXPERTS} experts at most", f"{num_experts} in {name!r}")
    nbytes = whole.nbytes // num_experts
    return {
        f"{name.removesuffix(EXPERTS)}.{number}.weight": Entry(
            shape=tuple(shape), type=whole.type, start=whole.start + number * nbytes, nbytes=nbytes
        )
        for number in range(num_experts)
    }


def _size(cursor: _Cursor, name: str, shape: tuple[int, ...], number: int) -> tuple[Any, int]:
    """The type of a tensor, and how many bytes it takes."""
    try:
        from gguf import GGMLQuantizationType
    except ImportError as error:
        raise MissingDependencyError("gguf", "gguf") from error
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise unserved(
            cursor.path, "types that the package gguf knows", f"type {number} of {name}", OTHER_FILE
        ) from None
    size, nbytes = block_size(kind)
    if 0 in shape or shape[-1] % size:
        raise cursor.wrong(f"{name!r} in whole blocks of {size}", f"shape {shape}")
    return kind, prod(shape) // size * nbytes
