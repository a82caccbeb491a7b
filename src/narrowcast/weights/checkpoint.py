"""Weights at rest: what a loader asks of a file, whatever it is made of."""

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor

from narrowcast.weights.formats import GroupedCodes, WeightFormat

ALL = slice(None)


class Checkpoint(Protocol):
    """A model's weights in its files, by the names of the engine's parameters. Only what is asked for is read."""

    @property
    def names(self) -> Collection[str]:
        """The parameters that the files hold."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Words for the user on all that is not as the files have it: "Q6_K is repacked to int8-group32"."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the parameter."""
        ...

    def format(self, name: str) -> WeightFormat | None:
        """The format in which the parameter can be kept; None for plain values."""
        ...

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        """A part of a parameter that has a format; `columns` begin and end with groups."""
        ...

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A part of a parameter as plain values: of the dtype in the file, FP32 of codes."""
        ...
