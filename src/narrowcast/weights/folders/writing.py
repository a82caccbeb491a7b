"""Writing the file of a folder in the kernels' layout, some rows at a time: the model may be larger than memory."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from narrowcast.progress import Progress, tell
from narrowcast.weights.folders.kernels import ALIGNMENT, METHOD
from narrowcast.weights.folders.tensors import DTYPES
from narrowcast.weights.formats import GroupedCodes
from narrowcast.weights.packed import BLOCK_ROWS, PackedMatrix, packed_shape, rows_at_a_time

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A parameter to write. `read(rows)`: some of its rows, as codes or as plain values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[slice], GroupedCodes | Tensor]


def write(
    path: Path, sources: Sequence[Source], digests: Mapping[str, Sequence[str]], frequency_divisors: Sequence[float]
) -> None:
    """Write a file that `KernelsFolder` reads, matrices first, in this order: those asked at once follow each other."""
    first = {each.name: each.read(slice(0, BLOCK_ROWS)) for each in sources}
    packed = [each for each in sources if isinstance(first[each.name], GroupedCodes)]
    plain = [each for each in sources if each not in packed]
    plain.sort(key=lambda each: -_dtype(first[each.name]).itemsize)  # so all of them begin at multiples of their size
    about = {
        "matrices": {each.name: _about(each, first[each.name]) for each in packed},
        "digests": digests,
        "frequency_divisors": frequency_divisors,
    }
    shapes = {each.name: _stored_shape(each, first[each.name]) for each in (*packed, *plain)}
    dtypes = {name: _dtype(first[name]) for name in shapes}
    with path.open("xb") as file:
        file.write(_header(shapes, dtypes, {METHOD: json.dumps(about)}))
        for done, each in enumerate((*packed, *plain)):
            tell(Progress(f"writing {path}", done, len(sources)))
            for rows in rows_at_a_time(slice(0, each.shape[0]), prod(each.shape[1:])):
                _write_rows(file, each.read(rows))
        file.flush()
        os.fsync(file.fileno())


def _write_rows(file: BinaryIO, found: GroupedCodes | Tensor) -> None:
    rows = PackedMatrix.pack(found).blocks if isinstance(found, GroupedCodes) else found.contiguous()
    file.write(rows.reshape(-1).view(torch.uint8).numpy().data)


def _about(source: Source, codes: GroupedCodes | Tensor) -> dict[str, Any]:
    """A matrix but for its blocks."""
    assert isinstance(codes, GroupedCodes)
    return {
        "format": codes.format.name,
        "shape": source.shape,
        "bf16_scales": codes.scales.dtype == torch.bfloat16,
        "scale": float(codes.scales) if codes.format.is_ternary else 1.0,
    }


def _stored_shape(source: Source, found: GroupedCodes | Tensor) -> tuple[int, ...]:
    if isinstance(found, Tensor):
        return source.shape
    return packed_shape(found.format, (source.shape[0], source.shape[1]))


def _dtype(found: GroupedCodes | Tensor) -> torch.dtype:
    return found.dtype if isinstance(found, Tensor) else torch.uint8


def _header(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    """As safetensors has it, padded to whole lines of the cache."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, shape in shapes.items():
        stop = start + prod(shape) * dtypes[name].itemsize
        entries[name] = {"dtype": NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
