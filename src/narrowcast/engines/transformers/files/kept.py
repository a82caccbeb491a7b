"""Matrices of a checkpoint as they are kept: codes as stored, codes made of values, or values."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from narrowcast.engines.base import Weights
from narrowcast.weights.checkpoint import ALL, Checkpoint
from narrowcast.weights.formats import Q4_0, Q8_0, GroupedCodes, WeightFormat
from narrowcast.weights.quantize import quantize_int4, quantize_int8


class Quantizer(NamedTuple):
    """Makes codes of values."""

    format: WeightFormat
    quantize: Callable[[Tensor], GroupedCodes]


QUANTIZERS: Mapping[str, Quantizer] = {
    "int4-group32": Quantizer(Q4_0, quantize_int4),
    "int8-group32": Quantizer(Q8_0, quantize_int8),
}


class Kept:
    """Matrices of a checkpoint by their names in it. `weights`: the format for those that it has as values.

    `output`: the one that gives logits.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        self._checkpoint, self.is_dense = checkpoint, weights == "dense"
        self._quantizer = QUANTIZERS.get(weights)
        self.output = ""

    @property
    def group_size(self) -> int | None:
        """Columns in a group of codes that are made of values; None where none are."""
        return None if self._quantizer is None else self._quantizer.format.group_size

    def format(self, name: str) -> WeightFormat | None:
        """The format to keep a matrix in; None for values."""
        if self.is_dense:
            return None
        if (stored := self._checkpoint.format(name)) is not None:
            return stored
        shape = self._checkpoint.shape(name)
        if (quantizer := self._quantizer_of(name)) is None or len(shape) != 2:
            return None
        return None if shape[1] % quantizer.format.group_size else quantizer.format

    def codes(self, name: str, rows: slice, columns: slice = ALL) -> GroupedCodes:
        """A part of a matrix that has a format; `columns` begin and end with groups."""
        if self._checkpoint.format(name) is not None:
            return self._checkpoint.codes(name, rows, columns)
        quantizer = self._quantizer_of(name)
        assert quantizer is not None
        return quantizer.quantize(self._checkpoint.values(name, rows, columns))

    def sample(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Values of the checkpoint in BF16, of a few columns: files have whole groups."""
        size = 1 if (form := self._checkpoint.format(name)) is None else form.group_size
        first = columns.start // size * size
        whole = self._checkpoint.values(name, rows, slice(first, -(-columns.stop // size) * size))
        return whole[:, columns.start - first : columns.stop - first].bfloat16()

    def _quantizer_of(self, name: str) -> Quantizer | None:
        """Logits want 8 bits: SmolLM2 in 4, output layer included, has a fifth more KL divergence."""
        return QUANTIZERS["int8-group32"] if self._quantizer and name == self.output else self._quantizer
