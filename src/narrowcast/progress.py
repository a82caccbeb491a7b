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
    """A long step, and how many parts are done, of how many where that is known."""

    doing: str
    done: int = 0
    total: int | None = None

    @property
    def counted(self) -> str:
        """The parts in words; "" where they are not counted."""
        return f"{self.done or ''}" if self.total is None else f"{self.done} of {self.total}"


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
