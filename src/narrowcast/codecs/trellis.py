"""Trellis-coded quantizers of the standard normal distribution, of 1 to 8 bits a value.

A quantizer of w bits has 2 ** (w + 1) levels, twice what w bits tell apart. The levels, in ascending order, fall in
turn into four subsets. Which subset a value is coded in follows from one bit of its code and from those of the two
values before it, so that two subsets are open to it, every other level; the other w - 1 bits are its place there. An
encoder finds the sequence of least square error by Viterbi's algorithm. At 2 to 4 bits a fourth to a third of the error
of a scalar quantizer is gone: some 0.2 bits a value for nothing. The first value has no other before it, and a scalar
quantizer's levels: those of Lloyd and Max.

M. W. Marcellin, T. R. Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Transactions
on Communications 38 (1990); the code is G. Ungerboeck's of four states, IEEE Transactions on Information Theory 28
(1982). The levels are part of a byte format, so they are data, in trellis.txt: a line for each width, of the positive
half of its symmetric levels, then a line for each width of first values. `benchmarks/codebooks.py` finds the former;
`tests/test_trellis.py` derives the latter.

Shapes: T tokens, S slots, L = 16 lanes, each of which is a sequence of its own: slots i, i + 16, i + 32, ...
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs.tables import PerDevice

UNIT = 4096  # levels are whole multiples of 1 / UNIT, hence edges of 1 / (2 * UNIT): FP32 holds both exactly
MAX_BITS = 8
LANES = 16
SUBSETS = STATES = 4

# Mean square error of a standard normal value in 0 to 8 bits, over sequences of 64 (benchmarks/codebooks.py).
DISTORTION = 1.0, 0.32035, 0.089624, 0.024526, 0.0064857, 0.0016887, 0.00043057, 0.00010834, 0.000027236

_WIDTHS = range(1, MAX_BITS + 1)


@cache
def levels(num_bits: int) -> Tensor:
    """The levels, fp32 [2 ** (num_bits + 1)], ascending. Every fourth one is of the same subset."""
    return _symmetric(_lines()[num_bits - 1])


@cache
def first_levels(num_bits: int) -> Tensor:
    """Those of first values, each twice, as two of the subsets are not open to these."""
    return _symmetric(_lines()[MAX_BITS + num_bits - 1]).repeat_interleave(2)


def _symmetric(line: str) -> Tensor:
    positive = [int(number) / UNIT for number in line.split()]
    return torch.tensor([-level for level in reversed(positive)] + positive, dtype=torch.float32)


@cache
def _lines() -> list[str]:
    return Path(__file__).with_suffix(".txt").read_text(encoding="ascii").splitlines()


def subsets(levels_M: Tensor) -> Tensor:
    """The levels of each subset, [4, M / 4]."""
    return levels_M.view(-1, SUBSETS).T.contiguous()


class TrellisTables(NamedTuple):
    """Look-ups, a row for each width, and again one for each of first values; fp32 [16, 512], both ascending.

    `levels`, zeros behind them. `edges`: halfway between a level and the next one of its subset, infinity behind them.
    Subsets take turns in both, so that n edges not above a value tell its nearest level in all four: of subset s it is
    number (n + 3 - s) // 4.
    """

    levels: Tensor
    edges: Tensor


@cache
def tables() -> PerDevice[TrellisTables]:
    """The tables of all widths."""
    return PerDevice(tables_of([levels(each) for each in _WIDTHS]))


def tables_of(levels_by_width: Sequence[Tensor]) -> TrellisTables:
    """The tables of other levels, by width from one bit on."""
    levels_by_width = [*levels_by_width, *(first_levels(each) for each in _WIDTHS)]
    edges_by_width = [(each[SUBSETS:] + each[:-SUBSETS]) / 2 for each in levels_by_width]
    pad, size = torch.nn.functional.pad, 2 ** (MAX_BITS + 1)
    return TrellisTables(
        levels=torch.stack([pad(each, (0, size - len(each))) for each in levels_by_width]),
        edges=torch.stack([pad(each, (0, size - len(each)), value=math.inf) for each in edges_by_width]),
    )


def encode(q_TS: Tensor, widths: Sequence[int], found: TrellisTables | None = None) -> Tensor:
    """Codes uint8 [T, S] of values, the bit of the path above the place in the subset.

    `widths`: bits of each 16 slots. Errors count in units of what is left at each width: 4 ** width times their square.
    """
    found = found or tables().on(q_TS.device)
    num_tokens, steps = len(q_TS), q_TS.unflatten(1, (-1, LANES)).unbind(1)
    metric = q_TS.new_full((STATES, num_tokens, LANES), math.inf)
    metric[0] = 0.0
    places, decisions = [], []
    for x_TL, width, row in zip(steps, widths, _rows(widths), strict=True):
        count = torch.bucketize(x_TL.contiguous(), found.edges[row, : 2 ** (width + 1) - SUBSETS], right=True)
        nearest = [count + 3 - subset >> 2 for subset in range(SUBSETS)]
        missed = [x_TL - found.levels[row, (place << 2) + subset] for subset, place in enumerate(nearest)]
        cost = [each * each * 4.0**width for each in missed]
        # State 2 b + a has the path bits a, b behind it; it comes from states 2 a and 2 a + 1.
        ways = [
            (metric[2 * a] + cost[2 * b + a], metric[2 * a + 1] + cost[2 * (1 - b) + a]) for b in (0, 1) for a in (0, 1)
        ]
        decisions.append(torch.stack([other < one for one, other in ways]).to(torch.uint8))
        metric = torch.stack([torch.where(other < one, other, one) for one, other in ways])
        places.append(torch.stack(nearest).to(torch.uint8))
    return _traced_back(metric.argmin(dim=0), places, decisions, widths)


def _traced_back(
    state_TL: Tensor, places: Sequence[Tensor], decisions: Sequence[Tensor], widths: Sequence[int]
) -> Tensor:
    codes = [state_TL.new_zeros(*state_TL.shape[:1], 0, dtype=torch.uint8)]
    for place, decision, width in zip(reversed(places), reversed(decisions), reversed(widths), strict=True):
        bit, before = state_TL >> 1, state_TL & 1
        first = decision.gather(0, state_TL[None])[0].long()
        subset = ((bit ^ first) << 1) + before
        codes.append(place.gather(0, subset[None])[0] | (bit << width - 1).to(torch.uint8))
        state_TL = (before << 1) + first
    return torch.cat(codes[:0:-1] or codes, dim=1)


def decode(codes_TS: Tensor, widths: Sequence[int], found: TrellisTables | None = None) -> Tensor:
    """The levels fp32 [T, S] that codes stand for; `widths` as in `encode`."""
    levels_WM = (found or tables().on(codes_TS.device)).levels
    decoded = [levels_WM.new_zeros(len(codes_TS), 0)]
    before = first = torch.zeros_like(codes_TS[:, :LANES], dtype=torch.long)
    steps = codes_TS.long().unflatten(1, (-1, LANES)).unbind(1)
    for code, width, row in zip(steps, widths, _rows(widths), strict=True):
        bit = code >> width - 1
        subset = ((bit ^ first) << 1) + before
        decoded.append(levels_WM[row][((code - (bit << width - 1)) << 2) + subset])
        before, first = bit, before
    return torch.cat(decoded, dim=1)


def _rows(widths: Sequence[int]) -> list[int]:
    """The row of tables for each step."""
    return [width - 1 + (0 if step else MAX_BITS) for step, width in enumerate(widths)]
