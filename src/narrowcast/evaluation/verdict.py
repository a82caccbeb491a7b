"""The verdict on a change: figures of two runs over the same items, compared pair by pair."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from narrowcast.scores.intervals import Interval, Items, holm

LEVEL = 0.05  # how often a gate may raise the alarm, over all figures, where nothing changed
DEFAULT_TOLERANCE = 0.05

Verdict = Literal["worse", "better", "same", "unclear"]

IN_NATS = "kl_nats", "nll_nats"  # of these less is better; of all others, shares of what is right, more


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure then and now.

    `change`: the mean paired difference, with its 95 % confidence `interval`. `tolerated`: the largest change that
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
        """The mean paired difference."""
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


def changes(
    baseline: Mapping[str, Items], found: Mapping[str, Items], *, tolerance: float = DEFAULT_TOLERANCE
) -> dict[str, Change]:
    """Compare each figure of `baseline`, item by item: sequences of a text, or questions of a task.

    "kl_nats" must be among them and "nll_nats" may be; any other figure is a share of right answers. `tolerance` is
    relative to what the baseline lacks: its KL divergence or, of a share, the rest to 1. NLL is allowed as many nats
    as the KL divergence, by which it grows on average on text that the uncompressed model wrote.
    """
    worse = {name: found[name] - items if name in IN_NATS else items - found[name] for name, items in baseline.items()}
    p_worse = holm({name: items.p_above_zero() for name, items in worse.items()})
    p_better = holm({name: (-items).p_above_zero() for name, items in worse.items()})
    return {
        name: Change(
            baseline=items.mean,
            found=found[name].mean,
            interval=(found[name] - items).interval(),
            tolerated=tolerance * (baseline["kl_nats"].mean if name in IN_NATS else 1 - items.mean),
            p_worse=p_worse[name],
            p_better=p_better[name],
            less_is_better=name in IN_NATS,
        )
        for name, items in baseline.items()
    }
