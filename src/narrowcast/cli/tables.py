"""Tables on the screen."""

from collections.abc import Iterable

from rich import box
from rich.markup import escape
from rich.table import Table


def table(title: str, words: Iterable[str], figures: Iterable[str] = ()) -> Table:
    """An empty table with these headings: columns of words, then columns of figures, which end at the right."""
    found = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in words:
        found.add_column(column, no_wrap=True)
    for column in figures:
        found.add_column(column, justify="right", no_wrap=True)
    return found
