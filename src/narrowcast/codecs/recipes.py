"""Recipes: how to make a codec from what calibration saw of a site."""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from narrowcast.codecs.base import Codec


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Smallest and largest value of each feature over tokens, per source: fp32 tensors [R, E].

    `scale_low` and `scale_high` are for scales, `low` and `high` for the choice of outliers: they differ where
    the first tokens of a sequence do not count for scales.
    """

    low: Tensor
    high: Tensor
    scale_low: Tensor
    scale_high: Tensor

    @classmethod
    def of(cls, x_RTE: Tensor) -> Self:
        """The ranges of all tokens of `x_RTE`."""
        low, high = x_RTE.float().amin(dim=1), x_RTE.float().amax(dim=1)
        return cls(low=low, high=high, scale_low=low, scale_high=high)

    @property
    def width(self) -> Tensor:
        """Twice the largest magnitude [R, E]: the range of a symmetric code."""
        return 2 * torch.maximum(self.low.abs(), self.high.abs())

    @property
    def scale_largest(self) -> Tensor:
        """Largest magnitude [R, E] that a scale must reach."""
        return torch.maximum(self.scale_low.abs(), self.scale_high.abs())


class Recipe(Protocol):
    """A maker of codecs: a preset, a codec that is spelt out, or an object of the user's own.

    `str` of ours gives their spelling back (`narrowcast.codecs.spelling`).
    """

    def codec(self, ranges: Ranges) -> Codec:
        """The codec for values in these ranges; InvalidInputError for ranges that it cannot be made from."""
        ...
