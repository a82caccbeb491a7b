"""A scorecard as Markdown, for a terminal or a pull request."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from narrowcast.evaluation.verdict import LEVEL, Change
from narrowcast.scorecard.card import Scorecard
from narrowcast.scorecard.figures import FIGURES, MACHINE, NLL
from narrowcast.scores import Interval, written

COLUMNS = "figure", "baseline", "now", "change", "95 % interval", "tolerated", "p", "verdict"


def page(card: Scorecard, against: str) -> str:
    """The card of a comparison `against` a file: what differs, then what moved, the worst of it in bold."""
    return "\n".join(_lines(card, against))


def _lines(card: Scorecard, against: str) -> Iterator[str]:
    workload = card.found.workload
    yield f"## {card.found.model}: {_summary(card)}\n"
    yield f"Against {against}: {workload.rounds} rounds of {workload.scenario}; {len(workload.texts)} texts scored.\n"
    if card.differs:
        yield from _table(("differs", "baseline", "now"), [(name, *both) for name, both in card.differs.items()])
    else:
        yield "Nothing that is known of server, plan and hardware differs.\n"
    yield from _table(COLUMNS, [_row(card, name, change) for name, change in card.changes.items()])
    if any(name in card.found.by_round for name in card.changes):
        yield "In brackets: quartiles over rounds; medians are compared."
    yield f"p: that this is an accident, Holm-corrected over the figures; below {LEVEL:g} it counts."
    verdicts = {card.verdict(name) for name in card.changes}
    if "unclear" in verdicts:
        yield "unclear: no sure change, but it may be more than is tolerated: more rounds or texts help."
    if card.caveat:
        yield f"not judged: {card.caveat}."
    elif MACHINE in card.changes:
        yield (
            f"{FIGURES[MACHINE].title}: the same work on this machine, before each round, whatever the server does. "
            "Where a speed got worse by no more than this may have, the verdict is unclear."
        )
    for name, why in card.unknown.items():
        yield f"{FIGURES[name].title}: not compared; {why}."


def _summary(card: Scorecard) -> str:
    return f"{', '.join(FIGURES[name].title for name in card.worse)} got worse" if card.worse else "nothing got worse"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    dashes = ["-" * width for width in widths]
    for row in (columns, dashes, *rows):
        yield f"| {' | '.join(cell.replace('|', '/').ljust(width) for cell, width in zip(row, widths, strict=True))} |"
    yield ""


def _row(card: Scorecard, name: str, change: Change) -> tuple[str, ...]:
    figure, verdict = FIGURES[name], card.verdict(name)
    moved_up = change.change > 0
    p = change.p_worse if moved_up == change.less_is_better else change.p_better
    then, now = (
        figure.form.format(value) + _spread(record.by_round.get(name, ()), figure.form)
        for value, record in ((change.baseline, card.baseline), (change.found, card.found))
    )
    return (
        figure.title,
        then,
        now,
        *(_in_nats(change) if name == NLL else _relative(change)),
        "" if name not in card.judged or math.isnan(p) else f"{p:.1g}",
        f"**{verdict}**" if verdict == "worse" else verdict,
    )


def _spread(rounds: Sequence[float], form: str) -> str:
    if len(set(rounds)) < 2:
        return ""
    low, high = np.quantile(rounds, (0.25, 0.75))
    return f" ({form.format(low)} to {form.format(high)})"


def _in_nats(change: Change) -> tuple[str, str, str]:
    perplexity = f"{math.expm1(change.change):+.1%}" if change.change < 100 else "beyond all"
    return (
        f"{change.change:+.4f} (perplexity {perplexity})",
        written(change.interval, "{:+.4f}"),
        f"{change.tolerated:g}",
    )


def _relative(change: Change) -> tuple[str, str, str]:
    """To the baseline."""
    scaled = change.interval and Interval(*(each / change.baseline for each in change.interval))
    return (
        f"{change.change / change.baseline:+.1%}",
        written(scaled, "{:+.1%}"),
        f"{change.tolerated / change.baseline:.1%}",
    )
