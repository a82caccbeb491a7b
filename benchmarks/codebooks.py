"""The levels of `allocated`'s trellis, found by Lloyd's iteration, and how near they come to what theory allows.

usage: python benchmarks/codebooks.py [--json FILE] [--levels FILE] [--iterations N]

Each level becomes the mean of the values that are coded in it, over sequences of 64 standard normal values; levels stay
symmetric. --levels: write what codecs/trellis.txt holds. Errors are of values that no level was fitted to.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reporting
import torch
from torch import Tensor

from narrowcast.codecs import trellis

LENGTH, NUM_ROWS = 64, 2000  # values in a sequence; rows of 16 sequences
LEAST_COUNT = 20  # values that a level is moved by
STEP = 1.5  # times the way to the mean
NARROWED = 0.92  # of the density that many levels have, a normal one of variance 3: fewer have more in the middle


def rows(iterations: int) -> Iterator[dict[str, Any]]:
    """By width: levels, and the mean square error that they leave of a standard normal value."""
    for width in range(1, trellis.MAX_BITS + 1):
        levels, best = _start(width), (math.inf, _start(width))
        for iteration in range(iterations):
            error, moved = _iterated(levels, width, seed=iteration % 3)
            best, levels = min(best, (error, levels), key=lambda each: each[0]), moved
        rounded = (best[1] * trellis.UNIT).round() / trellis.UNIT
        yield {
            "bits": width,
            "levels": [int(level * trellis.UNIT) for level in rounded[len(rounded) // 2 :].tolist()],
            **{f"error of {length}": _error(rounded, width, length, seed=99) for length in (36, 64, 128, 256)},
            "Lloyd-Max": _of_lloyd_and_max(width),
            "bound": 4.0**-width,
        }


def _start(width: int) -> Tensor:
    places = (torch.arange(2 ** (width + 1), dtype=torch.float64) + 0.5) / 2 ** (width + 1)
    return (NARROWED * math.sqrt(6) * torch.erfinv(2 * places - 1)).float()


def _iterated(levels: Tensor, width: int, seed: int) -> tuple[float, Tensor]:
    """The error of these levels, and levels moved to the means of what was coded in them, and beyond."""
    q, decoded = _coded(levels, width, LENGTH, seed)
    later = slice(trellis.LANES, None)  # first values have levels of their own
    codes = torch.bucketize(decoded[:, later].contiguous(), (levels[1:] + levels[:-1]) / 2).flatten()
    count = torch.bincount(codes, minlength=len(levels)).double()
    total = torch.bincount(codes, weights=q[:, later].flatten().double(), minlength=len(levels))
    count, total = count + count.flip(0), total - total.flip(0)
    means = torch.where(count > LEAST_COUNT, total / count.clamp(min=1), levels.double())
    moved = (levels + STEP * (means - levels)).sort().values
    return (decoded - q).double().square().mean().item(), ((moved - moved.flip(0)) / 2).float()


def _coded(levels: Tensor, width: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standard normal values, and what they are decoded to."""
    q = torch.randn(NUM_ROWS, length * trellis.LANES, generator=torch.Generator().manual_seed(seed))
    widths = [width] * length
    others = [torch.zeros(2 ** (each + 1)) for each in range(1, trellis.MAX_BITS + 1)]
    found = trellis.tables_of([*others[: width - 1], levels, *others[width:]])
    return q, trellis.decode(trellis.encode(q, widths, found), widths, found)


def _error(levels: Tensor, width: int, length: int, seed: int) -> float:
    q, decoded = _coded(levels, width, length, seed)
    return (decoded - q).double().square().mean().item()


def _of_lloyd_and_max(width: int) -> float:
    levels = trellis.first_levels(width)[::2]
    q = torch.randn(NUM_ROWS * 1000, generator=torch.Generator().manual_seed(99))
    return (levels[torch.bucketize(q, (levels[1:] + levels[:-1]) / 2)] - q).double().square().mean().item()


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--levels", type=Path, metavar="FILE")
    parser.add_argument("--iterations", type=int, default=40)
    asked: argparse.Namespace = parser.parse_args()
    table = []
    for found in rows(asked.iterations):
        table.append(found)
        print(*(f"{key} {value:.5g} " for key, value in found.items() if key != "levels"), flush=True)
    if asked.levels is not None:
        first = [trellis.first_levels(each)[2**each :: 2] * trellis.UNIT for each in range(1, trellis.MAX_BITS + 1)]
        lines = [*(each["levels"] for each in table), *(each.int().tolist() for each in first)]
        asked.levels.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines), encoding="ascii")
    reporting.write(asked.json, rows=table)


if __name__ == "__main__":
    main()
