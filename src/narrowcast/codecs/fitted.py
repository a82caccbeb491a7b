"""Recipes of codecs that are fitted to all sums of a model at once: `allocated`, and `transform` along other axes.

They say what can be asked for; `narrowcast.calibration.fit` does the fitting.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from narrowcast.codecs.allocated import AllocatedCodec
from narrowcast.codecs.allocation import AS_BF16, BLOCK, Entry, allocate, in_blocks
from narrowcast.codecs.base import Codec
from narrowcast.codecs.recipes import Ranges
from narrowcast.codecs.spelling import Spelt
from narrowcast.errors import InvalidInputError

MOST_RAISED = 1024.0  # times, of the scale of a feature that is not sent

# Second moments to observe: of features one by one, or of all pairs of them.
Moments = Literal["diagonal", "full"]
Axes = Literal["ranks", "site", "blocks"]
DEFAULT_BLOCK_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class FittedRecipe(Spelt, ABC):
    """By `bits` a value on average, or by the KL divergence, in nats, that the codecs may cost (`target_kl`).

    `algorithm`: the one whose payloads `bits` counts; None for the one that sends fewer bytes, one_shot between two
    ranks and two_shot among more.
    """

    moments: ClassVar[Moments]
    bits: float | None = None
    target_kl: float | None = None
    algorithm: str | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.target_kl is not None:
            raise InvalidInputError(
                "bits and target KL", expected="one of them", found="both", remedy="Leave one out: each sets the other."
            )
        for name, value in (("bits", self.bits), ("target KL", self.target_kl)):
            if value is not None and not 0 < value <= AS_BF16:
                raise InvalidInputError(
                    name, expected=f"above 0, {AS_BF16} at most", found=value, remedy="Choose another."
                )

    @property
    @abstractmethod
    def default_bits(self) -> float:
        """The budget where neither bits nor a target is given."""

    @abstractmethod
    def codec(self, ranges: Ranges) -> Codec:
        """The codec of one site alone; InvalidInputError where that needs more than ranges."""

    def algorithm_among(self, num_ranks: int) -> str:
        """The algorithm whose payloads count among so many ranks."""
        return self.algorithm or ("one_shot" if num_ranks == 2 else "two_shot")


@dataclass(frozen=True, kw_only=True)
class AllocatedRecipe(FittedRecipe):
    """Makes `AllocatedCodec`s along the features: of a whole model, or of a site that stands alone."""

    id: ClassVar[str] = "allocated"
    moments: ClassVar[Moments] = "diagonal"

    @property
    def default_bits(self) -> float:
        return 4.0

    def codec(self, ranges: Ranges) -> AllocatedCodec:
        """The codec of one site alone: bits by the features' variance, scales of a third of their largest magnitude."""
        if self.target_kl is not None:
            raise _needs_the_model(self, "allocated(bits=3)")
        scale_RE = ranges.scale_largest.float() / 3
        num_blocks = -(-scale_RE.shape[1] // BLOCK)
        bits = self.bits or self.default_bits
        return fitted(scale_RE, allocate([Entry(scale_RE.double().square())], bits * BLOCK * num_blocks / 8)[0])


@dataclass(frozen=True, kw_only=True)
class TransformRecipe(FittedRecipe):
    """Makes `TransformCodec`s: `allocated` along other axes than the features.

    `axes`: each rank's own, one set for all ranks of a site, or such a set within blocks of `block_size` features.
    """

    id: ClassVar[str] = "transform"
    moments: ClassVar[Moments] = "full"
    axes: Axes = "ranks"
    block_size: int = DEFAULT_BLOCK_SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1 or (self.axes != "blocks" and self.block_size != DEFAULT_BLOCK_SIZE):
            raise InvalidInputError(
                "block size",
                expected="1 or more, with axes blocks",
                found=f"{self.block_size} with axes {self.axes}",
                remedy="Leave it out, or choose blocks.",
            )

    @property
    def default_bits(self) -> float:
        return 1.5 if self.axes == "ranks" else 2.0

    def codec(self, ranges: Ranges) -> Codec:
        """InvalidInputError: the axes are those of second moments, which ranges do not tell."""
        raise _needs_the_model(self, "allocated")


def _needs_the_model(recipe: FittedRecipe, other: str) -> InvalidInputError:
    return InvalidInputError(
        f"codec {recipe}",
        expected="a whole model, to which it is fitted",
        found="the ranges of a single site",
        remedy=f"Calibrate a model with it, or choose {other} here.",
    )


def fitted(scale_RE: Tensor, widths_RN: Tensor, energy_RE: Tensor | None = None) -> AllocatedCodec:
    """The codec of these scales and widths, each source's features by falling energy (that of their scales).

    What is not sent is guarded from where it would be worth sending: its scale is raised to where its energy would be
    that of the least that is sent, so that a feature which hardly matters does not take the place of others.
    """
    energy_RE = scale_RE.double().square() if energy_RE is None else energy_RE.double()
    order_RE, _ = in_blocks(energy_RE)
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    num_sent_R = (BLOCK * (widths_RN > 0).sum(dim=1)).clamp(1, energy_RE.shape[1])
    least_R1 = energy_RE.gather(1, order_RE.long()).gather(1, num_sent_R[:, None] - 1)
    raised_RE = (least_R1 / energy_RE.clamp(min=smallest)).sqrt().clamp(1, MOST_RAISED)
    scale = (scale_RE * raised_RE).float().clamp(min=smallest).bfloat16()
    return AllocatedCodec(scale=scale, order=order_RE, widths=widths_RN)
