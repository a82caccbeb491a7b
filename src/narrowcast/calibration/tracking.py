"""Long loops, watched by whoever wants to."""

from collections.abc import Callable, Iterable
from typing import Any

# Passes steps on as they are, and tells whoever watches that they are taken, and for what.
Track = Callable[[Iterable[Any], str], Iterable[Any]]


def untold(steps: Iterable[Any], what: str) -> Iterable[Any]:
    """Steps that nobody watches."""
    return steps
