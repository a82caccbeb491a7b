"""Alerts, as Prometheus evaluates them. Each has a heading in docs/monitoring.md that says what to do.

Thresholds are between what benchmarks/alerts.py measures on text unlike the calibration's, and on a drifted model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from narrowcast.errors import InvalidInputError
from narrowcast.monitoring.queries import Queries

WRITTEN = "Written by narrowcast monitor export"
Severity = Literal["critical", "warning", "info"]  # somebody gets up; looks today; plans it

ERROR_FACTOR = 2.0  # times the plan's error: 30 sampled sums of other text stay below
DRIFT_FACTOR = 1.75  # the same of 100; another limit of errors moves this one, too
VISIBLE = 0.2  # relative error of a sum, as 4 bits have it: below, it may be any number of times the plan's
MOST_CLIPPED = 0.05  # of the values sent
MOST_GUARDED = 0.1  # of a site's tokens
CLIPPED_MORE, FEWEST_CLIPPED = 1.5, 0.01  # than the day before; shares below are none
MORE_BITS = 1.05  # than the plan's
SLOWER = 1.5  # than the baseline's first tokens

COUNTED, SAMPLED, LONG = Queries("10m"), Queries("30m"), Queries("6h")
ENOUGH, PLENTY = 30, 100  # sampled sums in a window, whose error does not depend on which ones they are
FEWEST_ANSWERS = 10  # of whose first tokens the mean is compared


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule: PromQL that has series while something is wrong, and becomes an alert when it has them for so long.

    `summary` is one line, with the labels and the value of a series as Prometheus's templates have them.
    """

    name: str
    expression: str
    lasting: str
    severity: Severity
    summary: str

    def to_yaml(self, runbook: str) -> str:
        """An entry of the list of rules; `runbook`: the page whose heading says what to do."""
        expression = self.expression.replace("\n", "\n          ")
        return f"""\
      - alert: {self.name}
        expr: |
          {expression}
        for: {self.lasting}
        labels:
          severity: {self.severity}
        annotations:
          summary: {json.dumps(self.summary)}
          runbook_url: {json.dumps(f"{runbook}#{self.name.lower()}")}
"""


def alerts(*, error_factor: float = ERROR_FACTOR, ttft_s: float | None = None) -> list[Alert]:
    """All of them. `error_factor`: times the plan's error that a site may have; `ttft_s`: mean seconds until the first
    token, of a baseline, without which those are not compared. InvalidInputError for either that is not positive.
    """
    for name, number in (("--error-factor", error_factor), ("--ttft", ttft_s)):
        if number is not None and not (math.isfinite(number) and number > 0):
            expected, remedy = "a number above 0", "Correct it or leave it out."
            raise InvalidInputError(name, expected=expected, found=number, remedy=remedy)
    return [*_gone(), *_wrong(error_factor), *_costly(ttft_s), _drifted(drift_factor(error_factor))]


def drift_factor(error_factor: float) -> float:
    """Times the plan's error that a site may have for hours, where for a while it may have `error_factor` times."""
    return DRIFT_FACTOR * error_factor / ERROR_FACTOR


def to_yaml(rules: Sequence[Alert], runbook: str) -> str:
    """A file of rules for Prometheus."""
    head = f"# {WRITTEN}: thresholds are explained in docs/monitoring.md.\n"
    entries = "".join(rule.to_yaml(runbook) for rule in rules)
    return f"{head}groups:\n  - name: narrowcast\n    rules:\n{entries}"


def _gone() -> list[Alert]:
    info = "count without (rank, version, plan, transport, kernels) (narrowcast_info)"
    return [
        Alert(
            name="NarrowcastServerDown",
            expression="up == 0 and on (job, instance) last_over_time(narrowcast_ranks[1d])",
            lasting="2m",
            severity="critical",
            summary="{{ $labels.instance }} does not answer: nobody is served there",
        ),
        Alert(
            name="NarrowcastRankGone",
            expression=f"{info} < narrowcast_ranks",
            lasting="1m",
            severity="critical",
            summary="{{ $labels.instance }} hears of {{ $value }} ranks only: one is lost, requests hang or fail",
        ),
    ]


def _wrong(error_factor: float) -> list[Alert]:
    counted = "narrowcast_site_non_finite_values_total"
    non_finite = (
        f"{COUNTED.total(counted, function='increase')} > 0",
        # Counters that begin above 0, as of a server whose first token was lost, increase by nothing.
        f"sum without (rank) ({counted} > 0 unless {counted} offset {COUNTED.window})",
        f"{COUNTED.total('narrowcast_site_sampled_non_finite_total', function='increase')} > 0",
    )
    return [
        Alert(
            name="NarrowcastNonFinite",
            expression="\nor ".join(non_finite),
            lasting="0s",
            severity="critical",
            summary="NaN or infinite values at {{ $labels.site }} on {{ $labels.instance }}: answers are broken",
        ),
        Alert(
            name="NarrowcastErrorAbovePlan",
            expression=_lossy(SAMPLED, error_factor, ENOUGH),
            lasting="5m",
            severity="warning",
            summary='{{ $labels.site }} on {{ $labels.instance }} loses {{ $value | printf "%.1f" }} times what the '
            "plan expects: answers get worse",
        ),
        Alert(
            name="NarrowcastSaturated",
            expression=f"{COUNTED.clipped()} > {MOST_CLIPPED:g}",
            lasting="10m",
            severity="warning",
            summary="{{ $value | humanizePercentage }} of the values at {{ $labels.site }} on {{ $labels.instance }} "
            "are clipped: they are larger than the plan has seen",
        ),
        Alert(
            name="NarrowcastGuardStorm",
            expression=f"{COUNTED.guarded()} > {MOST_GUARDED:g}",
            lasting="10m",
            severity="warning",
            summary="{{ $value | humanizePercentage }} of the tokens at {{ $labels.site }} on {{ $labels.instance }} "
            "are far out of the plan's range and coded coarsely",
        ),
    ]


def _lossy(queries: Queries, factor: float, num_sums: int) -> str:
    """Sites whose error is more than so many times the plan's, and visible, by that many sampled sums."""
    return (
        f"{queries.error_ratio()} > {factor:g}\n"
        f"and {queries.error()} > {VISIBLE:g}\n"
        f"and {queries.num_sampled()} >= {num_sums}"
    )


def _costly(ttft_s: float | None) -> list[Alert]:
    found = [
        Alert(
            name="NarrowcastBitsAbovePlan",
            expression=f"{COUNTED.bits()}\n  > {MORE_BITS:g} * {COUNTED.planned_bits()}",
            lasting="15m",
            severity="warning",
            summary='{{ $labels.instance }} sends {{ $value | printf "%.2f" }} bits a value, more than its plan says',
        )
    ]
    if ttft_s is not None:
        name = "vllm:time_to_first_token_seconds"
        enough = f"{COUNTED.over('increase', f'{name}_count')} >= {FEWEST_ANSWERS}"
        found.append(
            Alert(
                name="NarrowcastSlowFirstTokens",
                expression=f"{COUNTED.mean(name)} > {SLOWER:g} * {ttft_s:g}\nand {enough}",
                lasting="10m",
                severity="warning",
                summary="first tokens on {{ $labels.instance }} take {{ $value | humanizeDuration }} on average, "
                f"{ttft_s:g} s when the baseline was recorded",
            )
        )
    return found


def _drifted(factor: float) -> Alert:
    before = Queries(LONG.window, offset="1d")
    return Alert(
        name="NarrowcastRangesDrift",
        expression=(
            f"({_lossy(LONG, factor, PLENTY)})\n"
            f"or ({LONG.clipped()}\n  > {CLIPPED_MORE:g} * ({before.clipped()})\n  > {FEWEST_CLIPPED:g})"
        ),
        lasting="1h",
        severity="info",
        summary="what {{ $labels.site }} on {{ $labels.instance }} sends has moved away from what the plan was "
        "calibrated on: calibrate again",
    )
