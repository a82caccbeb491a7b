"""Calibration under a progress bar."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from narrowcast.calibration import DEFAULT_FIRST_TOKENS, DEFAULT_NUM_FIRST, Observations, observe
from narrowcast.calibration.moments import MomentsNeeded
from narrowcast.calibration.observers import FirstTokens
from narrowcast.launch import is_first_rank
from narrowcast.plan.split import Split


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of calibration."""

    groups: Sequence[Sequence[int]] = ()
    within: str = "bf16"
    first_tokens: FirstTokens = DEFAULT_FIRST_TOKENS
    num_first: int = DEFAULT_NUM_FIRST
    moments: MomentsNeeded = "none"


def observe_with_bar(
    model: nn.Module,
    found: Sequence[Tensor],
    split: Split,
    options: Options,
) -> Observations:
    """`observe` under a bar with rate and remaining time."""
    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not (is_first_rank() and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=len(found), rate="")

        def advance(done: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, rate=f"{speed:.1f} sequences/s" if speed else "")

        return observe(
            model,
            found,
            tp_size=split.tp_size,
            pp_size=split.pp_size,
            experts=split.experts,
            groups=options.groups,
            first_tokens=options.first_tokens,
            num_first=options.num_first,
            moments=options.moments,
            progress=advance,
        )
