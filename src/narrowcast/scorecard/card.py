"""The scorecard: what moved since a baseline, how surely, and what may have moved it."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from narrowcast.evaluation.verdict import LEVEL, Change, between_rounds, corrected, paired
from narrowcast.scorecard.figures import FIGURES, MACHINE, SPEEDS
from narrowcast.scorecard.record import Record
from narrowcast.scorecard.subject import HARDWARE
from narrowcast.scores.shifts import ratio_between

DEFAULT_TOLERANCE = 0.1  # of speed and bytes
DEFAULT_NATS = 0.01  # of NLL: one percent of perplexity, which docs/quality.md calls "none noticed"


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """The changes of all figures that both records have, and those which are `judged`; the `caveat` says why not all.

    `excused`: speeds which are worse by no more than the machine itself may be, if at all.
    `differs`: what else is not the same, by name, then and now. `unknown`: what is compared by nothing, and why.
    """

    baseline: Record
    found: Record
    changes: Mapping[str, Change]
    judged: frozenset[str]
    excused: frozenset[str]
    caveat: str
    differs: Mapping[str, tuple[str, str]]
    unknown: Mapping[str, str]

    @classmethod
    def of(
        cls,
        baseline: Record,
        found: Record,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
        nats: float = DEFAULT_NATS,
        any_hardware: bool = False,
    ) -> "Scorecard":
        """Compare two records of the same work.

        `tolerance`: of speed and bytes, relative to the baseline; `nats`: of NLL. Speeds are shown and not judged where
        the machine itself surely got slower, or is another one, the latter unless `any_hardware` is.
        """
        differs = _differences(baseline.about, found.about)
        same_hardware = HARDWARE not in differs
        changes = _changes(baseline, found, times=1 + tolerance, nats=nats)
        caveat = ""
        if not same_hardware and not any_hardware:
            caveat = "speeds of other hardware; --any-hardware judges them"
        elif same_hardware and MACHINE in changes and changes[MACHINE].p_worse < LEVEL:
            caveat = "speeds, as fixed work took longer here, too: check again when nothing else is at work"
        judged = changes.keys() - {MACHINE, *(SPEEDS if caveat else ())}
        changes |= corrected({name: change for name, change in changes.items() if name in judged})
        most = (1 + tolerance) * (_slowed(baseline, found) if same_hardware else 1.0)
        within = (name for name in judged.intersection(SPEEDS) if not _worse_beyond(changes[name], most))
        return cls(
            baseline=baseline,
            found=found,
            changes=changes,
            judged=frozenset(judged),
            excused=frozenset(within),
            caveat=caveat,
            differs=differs,
            unknown={
                name: f"{'now' if name in found.unknown else 'in the baseline'}, {why}"
                for name, why in {**baseline.unknown, **found.unknown}.items()
            },
        )

    @property
    def worse(self) -> list[str]:
        """Figures that got worse."""
        return [name for name in self.changes if self.verdict(name) == "worse"]

    def verdict(self, name: str) -> str:
        """The verdict on one of the changes, where it is judged."""
        if name == MACHINE:
            return ""
        if name not in self.judged:
            return "not judged"
        found = self.changes[name].verdict
        return "unclear" if found == "worse" and name in self.excused else found

    def to_json(self) -> dict[str, Any]:
        """All of it, the records too, as JSON values."""
        return {
            **self.found.to_json(),
            "baseline": self.baseline.to_json(),
            "differs": self.differs,
            "changes": {name: {**each.to_json(), "verdict": self.verdict(name)} for name, each in self.changes.items()},
            "not_compared": self.unknown,
            "not_judged": self.caveat,
            "worse": self.worse,
        }


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return {name: (then.get(name, "unknown"), now.get(name, "unknown")) for name in names}


def _changes(baseline: Record, found: Record, *, times: float, nats: float) -> dict[str, Change]:
    """The change of each figure that both have. Tolerated: so many times as much, and `nats` of NLL."""
    changes = {}
    for name, figure in FIGURES.items():
        less = figure.less_is_better
        if name in baseline.by_sequence and name in found.by_sequence:
            items = baseline.by_sequence[name], found.by_sequence[name]
            changes[name] = paired(*items, tolerated=nats, less_is_better=less)
        if name in baseline.by_round and name in found.by_round:
            rounds = baseline.by_round[name], found.by_round[name]
            tolerated = _tolerated(statistics.median(rounds[0]), times, less_is_better=less)
            changes[name] = between_rounds(*rounds, tolerated=tolerated, less_is_better=less)
    return changes


def _tolerated(before: float, times: float, *, less_is_better: bool) -> float:
    """The rate of work that takes so many times as long: so many times less."""
    return before * (times - 1 if less_is_better else 1 - 1 / times)


def _worse_beyond(change: Change, times: float) -> bool:
    tolerated = _tolerated(change.baseline, times, less_is_better=change.less_is_better)
    return replace(change, tolerated=tolerated).verdict == "worse"


def _slowed(baseline: Record, found: Record) -> float:
    """The times that fixed work takes now of those then, at most; never below 1, and 1 where that is not known."""
    then, now = (record.by_round.get(MACHINE, ()) for record in (baseline, found))
    ratio = ratio_between(then, now) if then and now else None
    return max(1.0, ratio.high) if ratio else 1.0
