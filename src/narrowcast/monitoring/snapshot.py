"""The figures of one rank at one moment, as they travel to whoever answers /metrics."""

import json
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Self

from narrowcast.codecs.kernels import selected
from narrowcast.plan import Plan
from narrowcast.plan.summary import mean_bits
from narrowcast.runtime.reports import Report


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that `rank` of `num_ranks` has sent. `about`: the plan, what carries it, what computes; it never changes.

    `planned_bits`: bits a value that the plan's sums have; None without a plan. `taken_s`: when, in Unix time.
    """

    rank: int
    num_ranks: int
    about: dict[str, str]
    planned_bits: float | None
    report: Report
    taken_s: float = field(default_factory=time.time, compare=False)

    @classmethod
    def of(cls, report: Report, plan: Plan | None, *, rank: int, num_ranks: int, transport: str) -> Self:
        """The figures of this process."""
        about = {
            "version": version("narrowcast"),
            "plan": "" if plan is None else plan.fingerprint[:12],
            "transport": transport,
            "kernels": selected(),
        }
        bits = None if plan is None else mean_bits(plan)
        return cls(rank=rank, num_ranks=num_ranks, about=about, planned_bits=bits, report=report)

    def after(self, report: Report) -> Self:
        """The figures of the same process now."""
        return replace(self, report=report, taken_s=time.time())

    def to_text(self) -> str:
        """All of it, as JSON."""
        return json.dumps(self, default=vars)  # between two steps: asdict takes ten times as long

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The snapshot of which `to_text` is that."""
        values = json.loads(text)
        return cls(**{**values, "report": Report.from_json(values["report"])})
