"""A linear layer's weight as quantizers pack it: several tensors, codes in the bits of 32-bit words."""

from collections.abc import Collection
from typing import Protocol

from narrowcast.weights.formats import GroupedCodes, WeightFormat


class PackedWeight(Protocol):
    """A weight [N, K] that is given in codes. `parts`: the tensors that it takes."""

    @property
    def parts(self) -> Collection[str]: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def format(self) -> WeightFormat: ...

    def codes(self, rows: slice, columns: slice) -> GroupedCodes:
        """Some rows, whole groups of columns."""
        ...
