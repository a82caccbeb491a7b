"""Lloyd-Max quantizers of the standard normal distribution, of 1 to 8 bits.

J. Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory 6 (1960); S. Lloyd, "Least squares
quantization in PCM", IEEE Transactions on Information Theory 28 (1982): each level is the mean of its cell, each edge
of a cell the middle between two levels. The levels are part of a byte format, so they are data, in lloyd_max.txt: a
line for each width, of the positive half of its symmetric levels. `tests/test_allocated_codec.py` derives them again.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs.tables import PerDevice

UNIT = 4096  # levels are whole multiples of 1 / UNIT, hence edges of 1 / (2 * UNIT): FP32 holds both exactly
MAX_BITS = 8

_WIDTHS = range(1, MAX_BITS + 1)


@cache
def levels(num_bits: int) -> Tensor:
    """The positive levels, fp32 [2 ** (num_bits - 1)], ascending."""
    line = _lines()[num_bits - 1]
    return torch.tensor([int(number) for number in line.split()], dtype=torch.float32) / UNIT


@cache
def _lines() -> list[str]:
    return Path(__file__).with_suffix(".txt").read_text(encoding="ascii").splitlines()


def edges(num_bits: int) -> Tensor:
    """The ends of the positive levels' cells, beyond which the next ones begin, fp32 [2 ** (num_bits - 1) - 1]."""
    positive = levels(num_bits)
    return (positive[1:] + positive[:-1]) / 2


@cache
def distortion() -> Tensor:
    """Mean square error of a standard normal value coded in 0 to 8 bits, fp64 [9]: 1, 0.3634, 0.1175, ..."""
    return torch.tensor([1.0, *(_distortion(num_bits) for num_bits in _WIDTHS)], dtype=torch.float64)


def _distortion(num_bits: int) -> float:
    """1 - E[level ** 2], as each level is the mean of its cell."""
    positive, normal = levels(num_bits).double(), torch.distributions.Normal(0.0, 1.0)
    ends = torch.cat([torch.zeros(1), edges(num_bits), torch.full((1,), 40.0)]).double()
    mass = normal.cdf(ends[1:]) - normal.cdf(ends[:-1])
    return 1 - float(2 * (mass * positive.square()).sum())


class LloydMaxTables(NamedTuple):
    """Look-ups of kernels, a row for each width.

    `by_code`: levels by code, fp32 [8, 256]. `edges`: infinity behind them, fp32 [8, 128]. `up_to`: how many edges
    there are up to place / 64, uint8 [8, 512]: edges lie farther apart than that.
    """

    by_code: Tensor
    edges: Tensor
    up_to: Tensor


@cache
def tables() -> PerDevice[LloydMaxTables]:
    """The tables of all widths."""
    pad, places = torch.nn.functional.pad, torch.arange(512) / 64
    by_code = [torch.cat([levels(each), -levels(each)]) for each in _WIDTHS]
    return PerDevice(
        LloydMaxTables(
            by_code=torch.stack([pad(each, (0, 256 - len(each))) for each in by_code]),
            edges=torch.stack([pad(edges(each), (0, 128 - len(edges(each))), value=torch.inf) for each in _WIDTHS]),
            up_to=torch.stack([torch.bucketize(places, edges(each), right=True).to(torch.uint8) for each in _WIDTHS]),
        )
    )
