"""One look for all tables."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_texts: int = 1) -> Table:
    """Rows of cells under `columns`: texts in the first `num_texts`, on the left, then figures, on the right.

    Columns without any cell are left out. No cell is cut or broken.
    """
    rows = list(rows)
    shown = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    found = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place in shown:
        found.add_column(columns[place], justify="left" if place < num_texts else "right", no_wrap=True)
    for row in rows:
        found.add_row(*(escape(row[place]) for place in shown))
    return found
