"""Rows of words and figures as text, for what is printed in Python."""

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """A line for each row of as many cells: the first to the left, all others to the right.

    >>> print(aligned([["site", "bits"], ["o_proj", "4.19"]]))
    site    bits
    o_proj  4.19
    """
    filled = list(rows)
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    )
