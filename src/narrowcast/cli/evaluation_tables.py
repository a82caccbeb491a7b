"""Tables of an evaluation: sites, tasks, and what changed since a baseline."""

import math
from collections.abc import Iterable, Mapping

from rich.table import Table

from narrowcast.cli.tables import screen, table
from narrowcast.evaluation import Change, Evaluation
from narrowcast.evaluation.tasks import AnsweredTasks, Figures
from narrowcast.evaluation.verdict import LEVEL
from narrowcast.plan.summary import short_name
from narrowcast.scores import written

LABELS = {"kl_nats": "KL", "top1_agreement": "top-1", "top5_agreement": "top-5", "nll_nats": "NLL"}


def sites(found: Evaluation) -> Table:
    """KL that each site adds, the worst first."""
    shown = table("each site coded alone", ("site",), ("KL added, nats", "95 % interval", "error", "clipped"))
    for each in sorted(found.sites, key=lambda each: -each.added_kl_nats.mean):
        shown.add_row(
            short_name(each.site),
            f"{each.added_kl_nats.mean:.6f}",
            written(each.added_kl_nats.interval(), "{:.6f}"),
            next((f"{error:.4f}" for error in found.plan.sites[each.site].error.values()), ""),
            str(each.report.num_saturated),
        )
    return shown


def sites_together(found: Evaluation) -> str:
    """A line on all sites: how many make up most of what all of them add."""
    added = sorted((max(each.added_kl_nats.mean, 0.0) for each in found.sites), reverse=True)
    most = next((number for number in range(1, len(added)) if sum(added[:number]) >= sum(added) / 2), len(added))
    return f"{len(added)} sites, alone and added up: {sum(added):.5f} nats, half of it from {most} of them\n"


def print_tasks(tasks: AnsweredTasks) -> None:
    """A row for each task, and one for all."""
    comparison, console = tasks.comparison, screen()
    columns = "items", "plain", "coded", "kept (95 %)", "changed (95 %)"
    shown = table("zero-shot accuracy, in percent", ("task",), columns)
    for name, figures in comparison.tasks.items():
        shown.add_row(name, *_task_cells(figures))
    if len(comparison.tasks) > 1:
        shown.add_row("mean", *_task_cells(comparison.mean))
    console.print(shown)
    for name, task in tasks.coded.items():
        if task.perplexity is not None:
            plain = tasks.uncompressed[name].perplexity
            console.print(f"{name}: perplexity {task.perplexity:.4f}, uncompressed {plain:.4f}")
        if task.num_truncated:
            console.print(f"{name}: {task.num_truncated} items were too long for the model and lost their beginning")


def print_changes(found: Mapping[str, Change], title: str) -> None:
    """A row for each figure: what moved, how surely, and the verdict."""
    columns = "before", "now", "change", "95 % interval", "limit", "p", "verdict"
    shown, console = table(f"{title}, in nats and shares", ("figure",), columns), screen()
    for name, change in found.items():
        shown.add_row(LABELS.get(name, name), *_change_cells(change), change.verdict)
    console.print(shown)
    console.print(f"p: that this is an accident, Holm-corrected over the figures; below {LEVEL:g} it counts.")
    if any(change.verdict == "unclear" for change in found.values()):
        console.print("unclear: no sure change, but the interval reaches beyond what is tolerated; more text helps")


def _task_cells(figures: Figures) -> Iterable[str]:
    kept, around = figures.kept_percent, figures.kept_interval
    low, high = figures.changed_interval
    return (
        str(figures.num_items),
        f"{100 * figures.accuracy_uncompressed:.1f}",
        f"{100 * figures.accuracy:.1f}",
        "-" if kept is None else f"{kept:.1f}" + (f" ({written(around, '{:.0f}')})" if around else ""),
        f"{100 * figures.changed:.1f} ({100 * low:.0f} to {100 * high:.0f})",
    )


def _three_digits(figure: float) -> str:
    """In seven characters at most, as a row has 80."""
    return f"{figure:.3g}" if figure >= 0.001 else f"{figure:.1e}".replace("e-0", "e-")


def _change_cells(change: Change) -> Iterable[str]:
    """The p-value is of the side to which the figure moved."""
    moved_up = change.change > 0
    p = change.p_worse if moved_up == change.less_is_better else change.p_better
    return (
        _three_digits(change.baseline),
        _three_digits(change.found),
        f"{change.change:+.2g}",
        written(change.interval, "{:+.2g}"),
        f"{change.tolerated:.1g}",
        "" if math.isnan(p) else f"{p:.1g}",
    )
