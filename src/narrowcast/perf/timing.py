"""Timing: cases taken in turn, so that whatever slows the machine down for a while slows all of them down."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Name = TypeVar("Name")
Span = tuple[int, int]  # start and end of one run, nanoseconds of the machine's monotonic clock

LEAST_ROUNDS, MOST_ROUNDS = 5, 1000


@dataclass(frozen=True)
class Case:
    """A run to time, and what must be done before it each time without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None

    def timed(self) -> Span:
        """Run it once."""
        self.prepare()
        start = time.perf_counter_ns()
        self.run()
        return start, time.perf_counter_ns()


def interleaved(cases: Mapping[Name, Case], num_rounds: int) -> dict[Name, list[Span]]:
    """The spans of each case in `num_rounds` rounds, each of which takes all cases in turn."""
    spans: dict[Name, list[Span]] = {name: [] for name in cases}
    for _ in range(num_rounds):
        for name, case in cases.items():
            spans[name].append(case.timed())
    return spans


def rounds_within(seconds: float, cases: Mapping[Name, Case]) -> int:
    """The number of rounds that take about `seconds`, by a round that also warms up."""
    interleaved(cases, 1)
    spent_ns = sum(end - start for spans in interleaved(cases, 1).values() for start, end in spans)
    return min(max(round(seconds * 1e9 / max(spent_ns, 1)), LEAST_ROUNDS), MOST_ROUNDS)


def over_ranks(spans_by_rank: Sequence[Sequence[Span]]) -> list[float]:
    """Seconds of each run, from when the last rank began to when the last one was done.

    Ranks of one machine share its clock. So a rank that was there earlier does not count its wait for the others.
    """
    return [
        (max(end for _, end in spans) - max(start for start, _ in spans)) / 1e9
        for spans in zip(*spans_by_rank, strict=True)
    ]


def seconds(spans: Sequence[Span]) -> list[float]:
    """Seconds of each run."""
    return over_ranks([spans])


def p99(values: Sequence[float]) -> float:
    """The value that 99 in 100 do not exceed; of less than 100, the largest."""
    return float(np.quantile(values, 0.99, method="inverted_cdf"))


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median: how far half of the runs stray."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float((high - low) / 2 / median)
