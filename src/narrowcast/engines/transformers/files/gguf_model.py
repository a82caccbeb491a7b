"""A GGUF file under the names of Transformers' parameters, with what llama.cpp has changed in them undone."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from narrowcast.engines.transformers.files.gguf_names import ARCHITECTURES, UNUSED, Architecture
from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.formats import GroupedCodes, WeightFormat
from narrowcast.weights.gguf import GgufFile
from narrowcast.weights.gguf.header import Header, read_header
from narrowcast.weights.parts import span
from narrowcast.weights.refusals import broken, unserved


def knows(path: Path) -> bool:
    """True if `GgufModel` can read the file; others Transformers may unpack. InvalidInputError if it is broken."""
    header = read_header(path)
    return header.architecture in ARCHITECTURES and not _strangers(header)


class GgufModel:
    """A `Checkpoint` of a GGUF file.

    InvalidInputError for a broken file, and for a model that is not in the table of architectures.
    """

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        header = self._file.header
        self._architecture = _architecture(header)
        self._names = {str(self._architecture.parameter(name)): name for name in header.entries.keys() - UNUSED}
        self._heads = _num_heads(header) if self._architecture.interleaved else {}

    @property
    def names(self) -> Collection[str]:
        return self._names.keys()

    @property
    def notes(self) -> Sequence[str]:
        left = sorted(UNUSED & self._file.header.entries.keys())
        return [
            *self._file.notes,
            *(f"{name} is left out, as Transformers does: positions are not scaled by it" for name in left),
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(self._names[name])

    def format(self, name: str) -> WeightFormat | None:
        return self._file.format(self._names[name])

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        if (order := self._order(name, rows)) is None:
            return self._file.codes(self._names[name], rows, columns)
        heads, within = order
        return self._file.codes(self._names[name], heads, columns).rows(within)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        heads, within = self._order(name, rows) or (rows, ALL)
        found = self._file.values(self._names[name], heads, columns)[within]
        return found.float() - 1 if self._architecture.norms_plus_one and name.endswith("norm.weight") else found

    def _order(self, name: str, rows: slice) -> tuple[slice, Tensor] | None:
        """The rows of the file that whole heads take, and where `rows` are among them; None if rows are in order."""
        if (num_heads := self._heads.get(self._names[name].split(".")[-2])) is None:
            return None
        num_rows = self.shape(name)[0]
        size, odd = divmod(num_rows, num_heads)
        if odd or size % 2:
            raise broken(self._file.header.path, f"{num_heads} heads of even size", f"{num_rows} rows of {name}")
        start, stop = span(rows, num_rows)
        first = start // size * size
        row = torch.arange(start, stop)
        half, pair = (row % size) // (size // 2), (row % size) % (size // 2)
        return slice(first, -(-stop // size) * size), row // size * size + 2 * pair + half - first


def _architecture(header: Header) -> Architecture:
    found = ARCHITECTURES.get(header.architecture)
    strangers = _strangers(header)
    if found is None or strangers:
        raise unserved(
            header.path,
            f"a model of {', '.join(ARCHITECTURES)}, without experts",
            f"{header.architecture}" + (f" with {strangers[0]}" if found else ""),
            "Use a folder of safetensors.",
        )
    layers = {name.split(".")[1] for name in header.entries if name.startswith("blk.")}
    if len(layers) != (count := header.number(f"{header.architecture}.block_count")):
        raise broken(header.path, f"{count} layers, as it says", f"tensors of {len(layers)}")
    return found


def _strangers(header: Header) -> list[str]:
    """Tensors that are no parameters of the model."""
    architecture = ARCHITECTURES.get(header.architecture)
    return [
        name for name in header.entries if name not in UNUSED and not (architecture and architecture.parameter(name))
    ]


def _num_heads(header: Header) -> dict[str, int]:
    queries = header.number(f"{header.architecture}.attention.head_count")
    return {"attn_q": queries, "attn_k": header.number(f"{header.architecture}.attention.head_count_kv", queries)}
