"""The verdict on a change: figures of two runs over the same items, pair by pair, or over rounds of the same work."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from narrowcast.scores.intervals import Interval, Items, holm
from narrowcast.scores.shifts import p_above, ratio_between

LEVEL = 0.05  # how often a gate may raise the alarm, over all figures, where nothing changed
DEFAULT_TOLERANCE = 0.05

Verdict = Literal["worse", "better", "same", "unclear"]

IN_NATS = "kl_nats", "nll_nats"  # of these less is better; of all others, shares of what is right, more


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure then and now.

    `change`: the difference, with its 95 % confidence `interval`. `tolerated`: the largest change that
    does not matter, in the figure's own unit. `p_worse`, `p_better`: Holm's p-values, one-sided.
    """

    baseline: float
    found: float
    interval: Interval | None
    tolerated: float
    p_worse: float
    p_better: float
    less_is_better: bool

    @property
    def change(self) -> float:
        """The mean paired difference, or that of medians."""
        return self.found - self.baseline

    @property
    def verdict(self) -> Verdict:
        """Moved, if that is both no accident and more than is tolerated; unclear, if it may be more all the same."""
        if not math.isfinite(self.found):
            return "worse"
        worse_by = self.change if self.less_is_better else -self.change
        if self.p_worse < LEVEL and worse_by > self.tolerated:
            return "worse"
        if self.p_better < LEVEL and -worse_by > self.tolerated:
            return "better"
        if self.interval is None:
            return "unclear"
        worst = self.interval.high if self.less_is_better else -self.interval.low
        return "unclear" if worst > self.tolerated else "same"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"change": self.change, "verdict": self.verdict}


def paired(baseline: Items, found: Items, *, tolerated: float, less_is_better: bool) -> Change:
    """The change of one figure, item by item; its p-values are yet to be `corrected` for the other figures."""
    more = found - baseline
    p_up, p_down = more.p_above_zero(), (-more).p_above_zero()
    return Change(
        baseline=baseline.mean,
        found=found.mean,
        interval=more.interval(),
        tolerated=tolerated,
        p_worse=p_up if less_is_better else p_down,
        p_better=p_down if less_is_better else p_up,
        less_is_better=less_is_better,
    )


def between_rounds(
    baseline: Sequence[float], found: Sequence[float], *, tolerated: float, less_is_better: bool
) -> Change:
    """The change of a figure's median over rounds, which are no pairs, of values above zero.

    Its p-values are yet to be `corrected` for the other figures.
    """
    p_up, p_down = p_above(found, baseline), p_above(baseline, found)
    before, ratio = statistics.median(baseline), ratio_between(baseline, found)
    return Change(
        baseline=before,
        found=statistics.median(found),
        interval=ratio and Interval(before * (ratio.low - 1), before * (ratio.high - 1)),
        tolerated=tolerated,
        p_worse=p_up if less_is_better else p_down,
        p_better=p_down if less_is_better else p_up,
        less_is_better=less_is_better,
    )


def corrected(changes: Mapping[str, Change]) -> dict[str, Change]:
    """The changes of all figures that are judged together, with Holm's p-values."""
    p_worse = holm({name: change.p_worse for name, change in changes.items()})
    p_better = holm({name: change.p_better for name, change in changes.items()})
    return {name: replace(change, p_worse=p_worse[name], p_better=p_better[name]) for name, change in changes.items()}


def changes(
    baseline: Mapping[str, Items], found: Mapping[str, Items], *, tolerance: float = DEFAULT_TOLERANCE
) -> dict[str, Change]:
    """Compare each figure of `baseline`, item by item: sequences of a text, or questions of a task.

    "kl_nats" must be among them and "nll_nats" may be; any other figure is a share of right answers. `tolerance` is
    relative to what the baseline lacks: its KL divergence or, of a share, the rest to 1. NLL is allowed as many nats
    as the KL divergence, by which it grows on average on text that the uncompressed model wrote.
    """
    return corrected(
        {
            name: paired(
                items,
                found[name],
                tolerated=tolerance * (baseline["kl_nats"].mean if name in IN_NATS else 1 - items.mean),
                less_is_better=name in IN_NATS,
            )
            for name, items in baseline.items()
        }
    )
