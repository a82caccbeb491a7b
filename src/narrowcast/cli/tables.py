"""Tables on the screen, of which no figure is ever cut."""

import os
import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PAGE = 80  # columns that any terminal has
WIDEST = 1000  # of a line in a pipe or a file, where nothing need fold


def screen() -> Console:
    """Standard output: as wide as a terminal is; elsewhere as wide as its lines, unless COLUMNS says how wide."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if narrow else WIDEST)


def table(title: str, words: Iterable[str], figures: Iterable[str] = ()) -> Table:
    """An empty table with these headings: columns of words, then columns of figures, which end at the right.

    Where it is too wide, words fold and figures stay whole.
    """
    found = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in words:
        found.add_column(column, overflow="fold")
    for column in figures:
        found.add_column(column, justify="right", no_wrap=True)
    return found


def cores(number: int) -> str:
    """So many, in words."""
    return f"{number} core{'s' * (number != 1)}"


def shared(number: int) -> str:
    """The sentence that goes with ranks which run on one machine of so many cores."""
    return f"Ranks share this machine's {cores(number)}, which ranks with a machine each would not."
