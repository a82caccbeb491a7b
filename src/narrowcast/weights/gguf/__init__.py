"""GGUF files: tensors in the blocks of llama.cpp, under the names that it gives them."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.formats import GroupedCodes, WeightFormat
from narrowcast.weights.gguf.blocks import OTHER_FILE, block_size, codes_of, format_of, note_of, readable, values_of
from narrowcast.weights.gguf.header import Entry, read_header
from narrowcast.weights.mapped import MappedFile
from narrowcast.weights.parts import group_span, span
from narrowcast.weights.refusals import unserved

CHUNK = 1 << 19  # values that are unpacked at a time: what stays in the cache


class GgufFile:
    """A `Checkpoint` of one file. Codes that cannot be kept are repacked while they are read, and `notes` says so.

    InvalidInputError for a broken file, or a type of block that the installed package gguf cannot unpack.
    """

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self._entries = self.header.entries
        for name, entry in self._entries.items():
            if not readable(entry.type):
                found = f"{entry.type.name} of {name}"
                raise unserved(path, "types that the package gguf can unpack", found, OTHER_FILE)
        self._file = MappedFile(path)

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    @property
    def notes(self) -> Sequence[str]:
        kinds = Counter(entry.type for name, entry in self._entries.items() if self.format(name))
        numbers = {kind: f"{count} tensor" + "s" * (count > 1) for kind, count in kinds.items()}
        return [f"{note} ({numbers[kind]})" for kind in kinds if (note := note_of(kind))]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def format(self, name: str) -> WeightFormat | None:
        entry = self._entries[name]
        return format_of(entry.type) if len(entry.shape) == 2 else None

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        form, entry = self.format(name), self._entries[name]
        assert form is not None
        start, stop = group_span(columns, entry.shape[1], form.group_size)
        chunks = [
            codes_of(entry.type, block_NBb).columns(start - before, stop - before)
            for block_NBb, before in self._blocks(entry, span(rows, entry.shape[0]), (start, stop))
        ]
        return GroupedCodes.joined(chunks)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        entry = self._entries[name]
        height, *middle, width = (1, *entry.shape) if len(entry.shape) == 1 else entry.shape
        if len(entry.shape) == 1:
            rows, columns = ALL, rows
        (top, bottom), (start, stop) = span(rows, height), span(columns, width)
        inner = prod(middle)
        chunks = [
            values_of(entry.type, block_NBb)[:, start - before : stop - before]
            for block_NBb, before in self._blocks(entry, (top * inner, bottom * inner), (start, stop))
        ]
        return torch.cat(chunks).reshape(
            stop - start if len(entry.shape) == 1 else (bottom - top, *middle, stop - start)
        )

    def _blocks(self, entry: Entry, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[tuple[Tensor, int]]:
        """Chunks of the blocks in which some rows and columns lie, [N, B, bytes of a block]; their first column."""
        size, nbytes = block_size(entry.type)
        first, last = columns[0] // size, -(-columns[1] // size)
        table_NBb = self._file.bytes[entry.start : entry.start + entry.nbytes].view(entry.num_rows, -1, nbytes)
        step = max(1, CHUNK // (size * max(1, last - first)))
        for top in range(rows[0], max(rows[1], rows[0] + 1), step):
            part_NBb = table_NBb[top : min(top + step, rows[1])]
            yield part_NBb[:, first:last].clone(memory_format=torch.contiguous_format), first * size
            self._file.forget(part_NBb, everywhere=False)
