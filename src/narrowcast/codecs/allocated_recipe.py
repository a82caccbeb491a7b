"""Making an `allocated` codec: from the ranges of one site, or from scales and widths that are known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.codecs.allocated import AllocatedCodec
from narrowcast.codecs.allocation import AS_BF16, BLOCK, Entry, allocate, in_blocks
from narrowcast.codecs.base import Ranges
from narrowcast.errors import InvalidInputError

MOST_RAISED = 1024.0  # times, of the scale of a feature that is not sent


@dataclass(frozen=True, kw_only=True)
class AllocatedRecipe:
    """Makes an `AllocatedCodec` of about `bits` a value from what calibration saw of one site.

    Which bits go where is decided by the features' variance alone, as the site stands alone: for a whole model,
    `calibrate` weighs all sites by what the loss minds.
    """

    bits: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.bits <= AS_BF16:
            raise InvalidInputError(
                "allocated codec", expected="0 to 16 bits a value", found=self.bits, remedy="Choose another budget."
            )

    def codec(self, ranges: Ranges) -> AllocatedCodec:
        """Scales of a third of each feature's largest magnitude."""
        scale_RE = ranges.scale_largest.float() / 3
        num_blocks = -(-scale_RE.shape[1] // BLOCK)
        return fitted(scale_RE, allocate([Entry(scale_RE.double().square())], self.bits * BLOCK * num_blocks / 8)[0])


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
