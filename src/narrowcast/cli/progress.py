"""Bars on stderr, where somebody watches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor

from narrowcast.launch import is_first_rank

T = TypeVar("T")


def tracked(steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The steps, under a bar."""
    console = Console(stderr=True)
    return iter(track(steps, what, total=total, console=console, transient=True, disable=_unwatched(console)))


@contextmanager
def calibrating(text: Sequence[Tensor]) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time, which is told the number of sequences that are done."""
    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=_unwatched(console)) as bar:
        task = bar.add_task("", total=len(text), rate="")

        def advance(done: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, rate=f"{speed:.1f} sequences/s" if speed else "")

        yield advance


def _unwatched(console: Console) -> bool:
    return not (is_first_rank() and console.is_terminal)
