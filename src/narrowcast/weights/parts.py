"""Parts of a matrix: where they begin and end."""

from narrowcast.errors import InvalidInputError


def span(part: slice, size: int) -> tuple[int, int]:
    """The beginning and the end of a slice of `size` rows or columns, taken one by one."""
    start, stop, step = part.indices(size)
    assert step == 1
    return start, max(start, stop)


def group_span(part: slice, size: int, group_size: int) -> tuple[int, int]:
    """As `span`; InvalidInputError for columns that do not begin and end with groups."""
    start, stop = span(part, size)
    if start % group_size or stop % group_size:
        raise InvalidInputError(
            "columns of a weight",
            expected=f"whole groups of {group_size}",
            found=f"{start} to {stop} of {size}",
            remedy="Split the model over fewer ranks.",
        )
    return start, stop
