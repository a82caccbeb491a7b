"""Folders in the kernels' own layout: matrices are computed with where they lie in the file (docs/formats.md).

Shapes: B blocks of 16 rows, C blocks of columns, N rows, K columns.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.folders.packed import check_part
from narrowcast.weights.folders.tensors import SINGLE, Tensors, metadata
from narrowcast.weights.formats import GroupedCodes, WeightFormat, format_named
from narrowcast.weights.mapped import MappedFile
from narrowcast.weights.packed import PackedMatrix, packed_shape
from narrowcast.weights.refusals import broken, unserved

METHOD = "narrowcast"  # in the config's quantization_config, and the key of what the file says of its tensors
VERSION = 1
ALIGNMENT = 64  # of matrices in the file, bytes: a line of the cache
PLAIN = "BF16", "F16", "F32"


class KernelsFolder:
    """A `Checkpoint` of matrices that are used as they are in the file, mapped, and of plain values.

    `digests`: by parameter, of the samples that tell the model it was packed of from others. `frequency_divisors`:
    FP32, as of GGUF files. InvalidInputError for a file that is broken or not of this version.
    """

    notes: Sequence[str] = ()

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        self._tensors, self._path = tensors, tensors.folder / SINGLE
        if (version := config.get("version")) != VERSION:
            raise unserved(tensors.folder, f"weights packed in version {VERSION}", version, "Pack the model again.")
        about = self._about()
        self._matrices = {name: self._matrix(name, each) for name, each in self._part(about, "matrices", dict).items()}
        self.digests: Mapping[str, Sequence[str]] = self._part(about, "digests", dict)
        if not all(
            isinstance(each, list) and all(isinstance(one, str) for one in each) for each in self.digests.values()
        ):
            raise broken(self._path, "lists of digests", "something else")
        divisors = self._part(about, "frequency_divisors", list)
        if not all(_is_number(each) and each > 0 for each in divisors):
            raise broken(self._path, "frequency divisors, positive numbers", divisors)
        self.frequency_divisors = torch.tensor(divisors) if divisors else None

    @property
    def names(self) -> Collection[str]:
        return self._tensors.names

    @property
    def file(self) -> MappedFile:
        """The file that all matrices are in."""
        return self._tensors.file(next(iter(self._tensors.names)))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._matrices[name].shape if name in self._matrices else self._tensors.shape(name)

    def format(self, name: str) -> WeightFormat | None:
        return self._matrices[name].format if name in self._matrices else None

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        return self._matrices[name].unpacked(rows, columns)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Plain ones as views of the file, those of codes in FP32."""
        if name in self._matrices:
            return self.codes(name, rows, columns).dequantized()
        if (dtype := self._tensors.dtype(name)) not in PLAIN:
            raise broken(self._path, f"{name} as {', '.join(PLAIN)}, or among its matrices", dtype)
        if (whole := self._tensors.view(name)) is None:
            return self._tensors.read(name, rows, columns)
        return whole[rows] if whole.ndim < 2 else whole[rows][..., columns]

    def matrix(self, name: str, rows: slice, columns: slice) -> PackedMatrix | None:
        """A part of a matrix, which is a view of the file; None where it begins or ends within a block."""
        return self._matrices[name].part(rows, columns)

    def _about(self) -> dict[str, Any]:
        """The description of its tensors in the file."""
        try:
            found = json.loads(metadata(self._path).get(METHOD, ""))
        except (ValueError, RecursionError, OSError):
            found = None
        if not isinstance(found, dict):
            raise broken(self._path, f"a header with JSON as {METHOD}", "none")
        return found

    def _part(self, about: Mapping[str, Any], key: str, kind: type) -> Any:
        found = about.get(key)
        if not isinstance(found, kind):
            raise broken(self._path, f"a {kind.__name__} of {key}", f"a {type(found).__name__}")
        return found

    def _matrix(self, name: str, found: object) -> PackedMatrix:
        """The blocks [B, C, bytes] of a matrix [N, K]."""
        about = found if isinstance(found, dict) else {}
        form, scale, in_bf16 = format_named(str(about.get("format"))), about.get("scale"), about.get("bf16_scales")
        shape = None if form is None else _shape(about.get("shape"), form)
        if form is None or shape is None or not _is_number(scale) or not isinstance(in_bf16, bool):
            raise broken(self._path, f"format, shape and scales of {name}", found)
        if in_bf16 and torch.bfloat16 not in form.scale_dtypes:
            raise broken(self._path, f"scales of {name} in {form.scale_dtypes[0]}", "torch.bfloat16")
        check_part(self._tensors, name, ("U8",), packed_shape(form, shape))
        if offset := self._tensors.start(name) % ALIGNMENT:
            raise broken(self._path, f"{name} at a multiple of {ALIGNMENT} bytes", f"{offset} bytes behind one")
        blocks = self._tensors.view(name)
        assert blocks is not None
        return PackedMatrix(form, shape, blocks, bf16_scales=in_bf16, scale=scale)


def _is_number(found: object) -> TypeGuard[float]:
    return isinstance(found, float) and math.isfinite(found)


def _shape(found: object, form: WeightFormat) -> tuple[int, int] | None:
    """Rows and columns, the latter in whole groups; None for anything else."""
    match found:
        case [int(num_rows), int(num_columns)] if min(found) > 0 and num_columns % form.group_size == 0:
            return num_rows, num_columns
    return None
