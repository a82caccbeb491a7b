"""Bars on stderr, where somebody watches."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track

from narrowcast.launch import is_first_rank


def tracked(steps: Iterable[Any], what: str) -> Iterable[Any]:
    """The steps, under a bar."""
    console = Console(stderr=True)
    return track(steps, what, console=console, transient=True, disable=_unwatched(console))


def _unwatched(console: Console) -> bool:
    return not (is_first_rank() and console.is_terminal)
