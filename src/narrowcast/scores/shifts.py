"""Distances between the figures of two runs, by their order alone: a stray one among them is no more than one.

The test of Mann and Whitney, and the interval of Hodges and Lehmann that belongs to it; exact, as rounds are few.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from narrowcast.scores.intervals import CONFIDENCE, Interval


def p_above(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The probability that `mine` lie this far above `theirs`, or farther, where both are drawn alike.

    >>> p_above([5, 6, 7], [1, 2, 3]), p_above([1, 1], [1, 1])
    (0.05, 0.6666666666666666)
    """
    pairs = [(one, other) for one in mine for other in theirs]
    above = sum(one > other for one, other in pairs) + sum(one == other for one, other in pairs) // 2
    return sum(_orders(len(mine), len(theirs))[above:]) / math.comb(len(mine) + len(theirs), len(mine))


def ratio_between(theirs: Sequence[float], mine: Sequence[float]) -> Interval | None:
    """The 95 % confidence interval of mine over theirs, all above zero; None where there are too few to tell.

    >>> ratio_between([1, 1, 2, 2], [10, 10, 20, 20])
    Interval(low=5.0, high=20.0)
    """
    ratios = sorted(one / other for one in mine for other in theirs)
    tail = (1 - CONFIDENCE) / 2 * math.comb(len(mine) + len(theirs), len(mine))
    outside = sum(sum_up_to <= tail for sum_up_to in accumulate(_orders(len(mine), len(theirs))))
    return Interval(ratios[outside - 1], ratios[-outside]) if outside else None


@cache
def _orders(num_mine: int, num_theirs: int) -> tuple[int, ...]:
    """Of all orders of so many of mine and of theirs, the number in which `u` pairs have mine above, by `u`."""
    if not num_mine or not num_theirs:
        return (1,)
    counts = [0] * (num_mine * num_theirs + 1)
    for below, orders in (
        (num_theirs, _orders(num_mine - 1, num_theirs)),  # the highest of all is mine
        (0, _orders(num_mine, num_theirs - 1)),  # or theirs
    ):
        for u, number in enumerate(orders):
            counts[u + below] += number
    return tuple(counts)
