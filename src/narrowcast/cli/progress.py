"""Bars on stderr, where somebody watches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, track
from torch import Tensor

from narrowcast.launch import is_first_rank


def tracked(steps: Iterable[Tensor], what: str) -> Iterable[Tensor]:
    """The steps, under a bar."""
    console = Console(stderr=True)
    return track(steps, what, console=console, transient=True, disable=_unwatched(console))


@contextmanager
def calibrating(text: Sequence[Tensor]) -> Iterator[Callable[[int], None]]:
    """A bar that is told the number of sequences that are done."""
    columns, console = (*Progress.get_default_columns(), MofNCompleteColumn()), Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=_unwatched(console)) as bar:
        task = bar.add_task("calibrating", total=len(text))
        yield lambda done: bar.update(task, completed=done)


def _unwatched(console: Console) -> bool:
    return not (is_first_rank() and console.is_terminal)
