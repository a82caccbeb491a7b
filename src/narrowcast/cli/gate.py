"""`narrowcast gate`: whether a plan's answers got worse than those of a stored baseline."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast.calibration.text import DEFAULT_LENGTH
from narrowcast.cli.options import (
    Algorithm,
    Device,
    Length,
    ModelArgument,
    PlanOption,
    Real,
    ScoringText,
    Timeout,
    TransportOption,
)
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.evaluation import Subject
from narrowcast.evaluation.verdict import DEFAULT_TOLERANCE, LEVEL, Change, changes
from narrowcast.files import check_report, read_report, write_report
from narrowcast.scores import Items
from narrowcast.transport import DEFAULT_TIMEOUT_S

UPDATE = "Pass --update to write one."
LABELS = {"kl_nats": "KL, nats", "top1_agreement": "top-1", "top5_agreement": "top-5", "nll_nats": "NLL, nats"}


def gate(
    model: ModelArgument,
    plan: PlanOption,
    baseline: Annotated[Path, typer.Option(help="Figures to compare with: what --update or evaluate --json wrote.")],
    update: Annotated[bool, typer.Option("--update", help="Write the baseline instead; replaces an earlier one.")] = (
        False
    ),
    tolerance: Annotated[
        float, typer.Option(min=0, help="A change that does not matter: a share of what the baseline lacks.")
    ] = DEFAULT_TOLERANCE,
    real: Real = False,
    text: ScoringText = None,
    json: Annotated[Path | None, typer.Option(help="Write what changed here; replaces an earlier report.")] = None,
    num_sequences: Annotated[int, typer.Option("--sequences", min=2, help="Sequences at most.")] = 32,
    length: Length = DEFAULT_LENGTH,
    algorithm: Algorithm = "auto",
    transport: TransportOption = "auto",
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    device: Device = "cpu",
) -> None:
    """Score MODEL with a plan, and end with status 1 if any figure got worse than in the baseline.

    Sequences are compared pair by pair. A figure got worse if that is no accident and more than is tolerated.
    The baseline must be of the same model, split, algorithm and text.
    """
    check_report(json)
    check_report(baseline if update else None)
    subject = Subject.load(
        model,
        plan,
        text,
        num_sequences=num_sequences,
        length=length,
        algorithm=algorithm,
        real=real,
        transport=transport,
        timeout_s=timeout,
        device=device,
    )
    if len(subject.batches) < 2:
        raise InvalidInputError(
            str(subject.text), expected="two sequences or more", found=len(subject.batches), remedy="Pass more text."
        )
    stored = {} if update else _stored(baseline, subject)
    evaluation = subject.evaluate()
    if evaluation is None:
        return
    _check_pairs(stored, evaluation.score.by_sequence, baseline)
    if update:
        _check_finite(evaluation.score.by_sequence)
        write_report(baseline, evaluation.to_json())
        typer.echo(f"{baseline}: {len(subject.batches)} sequences, KL {evaluation.score.kl_nats:.5f} nats")
        return
    found = changes(stored, evaluation.score.by_sequence, tolerance=tolerance)
    if json is not None:
        figures = {name: change.to_json() for name, change in found.items()}
        write_report(json, evaluation.to_json() | {"baseline": str(baseline), "changes": figures})
    _print(found, escape(f"{model}, {plan}, {subject.plan.split}, against {baseline}"))
    if any(change.verdict == "worse" for change in found.values()):
        raise typer.Exit(1)


def _stored(path: Path, subject: Subject) -> dict[str, Items]:
    """The baseline's figures by item, if they may be compared with those of `subject`."""
    report = read_report(path, remedy=UPDATE)
    subject.check_comparable(report, path)
    try:
        return {name: Items.from_json(items) for name, items in report["by_sequence"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            str(path), expected="figures by sequence", found=f"{type(error).__name__}: {error}", remedy=UPDATE
        ) from error


def _check_finite(found: Mapping[str, Items]) -> None:
    for name, items in found.items():
        if not all(map(math.isfinite, items.values)):
            raise InvalidInputError(name, expected="numbers", found="NaN or infinity", remedy="Use another plan.")


def _check_pairs(stored: Mapping[str, Items], found: Mapping[str, Items], path: Path) -> None:
    """InvalidInputError unless every figure of the baseline was found for the same items."""
    for name, items in stored.items():
        if name not in found or found[name].weights != items.weights:
            other = "other items" if name in found else "none"
            raise InvalidInputError(str(path), expected=f"items of {name} as scored", found=other, remedy=UPDATE)


def _print(found: Mapping[str, Change], title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("figure", no_wrap=True)
    for column in ("baseline", "now", "change", "95 % interval", "allowed", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, change in found.items():
        table.add_row(LABELS.get(name, name), *_cells(change), change.verdict)
    console = Console()
    console.print(table)
    console.print(
        f"p: that this is an accident, Holm-corrected over the figures; below {LEVEL:g} it counts.", highlight=False
    )
    if any(change.verdict == "unclear" for change in found.values()):
        console.print(
            "unclear: no sure change, but the interval reaches beyond what is tolerated; more --sequences help"
        )


def _cells(change: Change) -> list[str]:
    """What moved, and how surely: the p-value is of the side to which it moved."""
    moved_up = change.change > 0
    p = change.p_worse if moved_up == change.less_is_better else change.p_better
    interval = "" if change.interval is None else f"{change.interval.low:+.2g} {change.interval.high:+.2g}"
    numbers = f"{change.baseline:.3g}", f"{change.found:.3g}", f"{change.change:+.2g}"
    return [*numbers, interval, f"{change.tolerated:.2g}", "" if math.isnan(p) else f"{p:.1g}"]
