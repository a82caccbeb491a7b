"""Progress of long work, told to whoever watches."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Passes steps on as they are: `what` they are, and `total`, how many, where that cannot be asked of them."""

    def __call__(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """The same steps."""
        ...


def untold(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Steps that nobody watches."""
    return steps
