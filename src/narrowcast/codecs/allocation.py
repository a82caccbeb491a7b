"""Bits for each block of features: reverse water-filling on what a bit is worth.

Coding an independent Gaussian component of energy g (its variance times how much the loss minds an error in it) in w
bits leaves an expected loss g * D(w), D falling ever more slowly. So bits are handed out one by one to whoever gains
most: the discrete form of reverse water-filling (Cover & Thomas, Elements of Information Theory, 10.3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.codecs import trellis

BLOCK = 32  # features that share a width
AS_BF16 = 16  # the width of a block that is sent as it is

UNIT_NBYTES = BLOCK // 8  # one bit for each feature of a block


@dataclass(frozen=True)
class Entry:
    """One payload that has its share in the budget: what is sent at a hop of a site.

    `energy`: [R, E], per source and feature, in units of the loss. `counted`: whether its bytes count; what is not
    counted gets bits down to the same worth of a bit.
    """

    energy: Tensor
    counted: bool = True


def in_blocks(energy_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Each source's features by falling energy, int32 [R, E], and the energy of their blocks [R, N]."""
    order_RE = energy_RE.argsort(dim=1, descending=True, stable=True)
    sorted_RE = energy_RE.gather(1, order_RE)
    padded = torch.nn.functional.pad(sorted_RE, (0, -energy_RE.shape[1] % BLOCK))
    return order_RE.to(torch.int32), padded.unflatten(1, (-1, BLOCK)).sum(dim=2)


def allocate(entries: Sequence[Entry], budget_nbytes: float) -> list[Tensor]:
    """Widths uint8 [R, N] of each entry's blocks, in the order of `in_blocks`.

    The rows of counted entries take `budget_nbytes` at most in all, scale bytes apart. All sources of an entry get
    rows of one size: a unit of bytes is worth what all of them together gain by it.
    """
    gains = [_falling_gains(in_blocks(entry.energy.double())[1]) for entry in entries]
    worth = [each.values.sum(dim=0) for each in gains]
    counted = torch.cat([each for each, entry in zip(worth, entries, strict=True) if entry.counted])
    num_units = max(0, min(int(budget_nbytes // UNIT_NBYTES), len(counted)))
    least = counted.sort(descending=True).values[num_units - 1] if num_units > 0 else torch.inf
    widths, left = [], num_units - int((counted > least).sum())  # for gains just as large as the least one
    for entry, each, found in zip(entries, worth, gains, strict=True):
        taken = int((each >= least).sum())
        if entry.counted:
            equal = int((each == least).sum())
            taken -= max(0, equal - left)  # the last entry may go without
            left -= min(equal, left)
        widths.append(_widths(found.indices[:, :taken], len(each) // AS_BF16))
    return widths


def _falling_gains(energy_RN: Tensor) -> torch.return_types.sort:
    """Gains by each further bit of each block, per source, falling; `indices` divided by 16 are the blocks."""
    distortion = torch.tensor(trellis.DISTORTION, dtype=torch.float64)
    last = distortion[-1:] / (AS_BF16 - trellis.MAX_BITS)  # as BF16 nothing is left of it
    gains = torch.cat([distortion[:-1] - distortion[1:], last.expand(AS_BF16 - trellis.MAX_BITS)])
    return (energy_RN[..., None] * gains).flatten(1).sort(dim=1, descending=True, stable=True)


def _widths(taken_RJ: Tensor, num_blocks: int) -> Tensor:
    """Bits that each block was given; between 8 bits and BF16 there is nothing."""
    ones = torch.ones_like(taken_RJ)
    widths_RN = taken_RJ.new_zeros(len(taken_RJ), num_blocks).scatter_add(1, taken_RJ // AS_BF16, ones)
    between = (widths_RN > trellis.MAX_BITS) & (widths_RN < AS_BF16)
    return widths_RN.masked_fill(between, trellis.MAX_BITS).to(torch.uint8)
