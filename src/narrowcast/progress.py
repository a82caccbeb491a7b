"""Progress of long work, told by whatever does it to whoever listens: the command line, or a function of yours.

    with heard_by(print):
        narrowcast.calibrate(model, batches, tp_size=2)

What the first of the ranks that were started here tells is heard here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Hear = Callable[[Any], None]

_listeners: list[Hear] = []  # the last one hears, whichever thread tells


@dataclass(frozen=True)
class Progress:
    """A long step, and how many parts of how many are done, where they are counted."""

    doing: str
    done: int = 0
    total: int | None = None


def tell(said: object) -> None:
    """Pass a `Progress`, or what else listeners know, to whoever listens."""
    if _listeners:
        _listeners[-1](said)


def told(parts: Sequence[T], doing: str) -> Iterator[T]:
    """The parts of a long step, each of which is told when it begins."""
    for done, part in enumerate(parts):
        tell(Progress(doing, done, len(parts)))
        yield part


@contextmanager
def heard_by(hear: Hear) -> Iterator[None]:
    """Let `hear` know what is told in the meantime."""
    _listeners.append(hear)
    try:
        yield
    finally:
        _listeners.remove(hear)
