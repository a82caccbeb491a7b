"""Tables of an evaluation: figures, sites, tasks, and what changed since a baseline."""

import math
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from narrowcast.evaluation import Change, Evaluation
from narrowcast.evaluation.drawings import short
from narrowcast.evaluation.evaluation import FIGURES
from narrowcast.evaluation.tasks import AnsweredTasks, Figures
from narrowcast.evaluation.verdict import LEVEL

LABELS = {"kl_nats": "KL, nats", "top1_agreement": "top-1", "top5_agreement": "top-5", "nll_nats": "NLL, nats"}


def figures(found: Evaluation, title: str) -> Table:
    """Figures with their intervals."""
    table = Table("figure", "value", "95 % interval", title=title)
    for name, (what, form) in FIGURES.items():
        interval = found.score.intervals[name]
        cell = "" if interval is None else f"{form.format(interval.low)} to {form.format(interval.high)}"
        table.add_row(what, form.format(getattr(found.score, name)), cell)
    for percentile, value in found.score.kl_percentiles.items():
        what = "largest KL of a token" if percentile == "100" else f"KL, {percentile} % of tokens at most"
        table.add_row(what, f"{value:.5f}")
    table.add_row("tokens scored", str(found.score.num_tokens))
    return table


def sites(found: Evaluation) -> Table:
    """KL that each site adds, the worst first."""
    table = Table("site", "KL added, nats", "95 % interval", "error", "clipped", title="each site coded alone")
    for each in sorted(found.sites, key=lambda each: -each.added_kl_nats.mean):
        interval, errors = each.added_kl_nats.interval(), found.plan.sites[each.site].error
        table.add_row(
            short(each.site),
            f"{each.added_kl_nats.mean:.6f}",
            "" if interval is None else f"{interval.low:.6f} to {interval.high:.6f}",
            "" if not errors else f"{next(iter(errors.values())):.4f}",
            str(each.report.num_saturated),
        )
    return table


def print_tasks(tasks: AnsweredTasks) -> None:
    """A row for each task, and one for all."""
    comparison, console = tasks.comparison, Console()
    headings = "task", "items", "plain", "coded", "kept (95 %)", "changed (95 %)"
    table = Table(*headings, title="zero-shot accuracy, in percent")
    for name, each in comparison.tasks.items():
        table.add_row(name, *_task_cells(each))
    if len(comparison.tasks) > 1:
        table.add_section()
        table.add_row("mean", *_task_cells(comparison.mean))
    console.print(table)
    for name, task in tasks.coded.items():
        if task.perplexity is not None:
            console.print(
                f"{name}: perplexity {task.perplexity:.4f}, uncompressed {tasks.uncompressed[name].perplexity:.4f}"
            )
        if task.num_truncated:
            console.print(f"{name}: {task.num_truncated} items were too long for the model and lost their beginning")


def print_changes(found: Mapping[str, Change], title: str) -> None:
    """A row for each figure: what moved, how surely, and the verdict."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("figure", no_wrap=True)
    for column in ("baseline", "now", "change", "95 % interval", "allowed", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, change in found.items():
        table.add_row(LABELS.get(name, name), *_change_cells(change), change.verdict)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"p: that this is an accident, Holm-corrected over the figures; below {LEVEL:g} it counts.")
    if any(change.verdict == "unclear" for change in found.values()):
        console.print("unclear: no sure change, but the interval reaches beyond what is tolerated; more text helps")


def _task_cells(figures: Figures) -> tuple[str, ...]:
    kept, around = figures.kept_percent, figures.kept_interval
    low, high = figures.changed_interval
    return (
        str(figures.num_items),
        f"{100 * figures.accuracy_uncompressed:.1f}",
        f"{100 * figures.accuracy:.1f}",
        "-" if kept is None else f"{kept:.1f}" + ("" if around is None else f" ({around[0]:.0f} to {around[1]:.0f})"),
        f"{100 * figures.changed:.1f} ({100 * low:.0f} to {100 * high:.0f})",
    )


def _change_cells(change: Change) -> list[str]:
    """The p-value is of the side to which the figure moved."""
    moved_up = change.change > 0
    p = change.p_worse if moved_up == change.less_is_better else change.p_better
    interval = "" if change.interval is None else f"{change.interval.low:+.2g} {change.interval.high:+.2g}"
    numbers = f"{change.baseline:.3g}", f"{change.found:.3g}", f"{change.change:+.2g}"
    return [*numbers, interval, f"{change.tolerated:.2g}", "" if math.isnan(p) else f"{p:.1g}"]
