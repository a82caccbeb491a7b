"""Parts of a forward in turns: while the sums of one part travel, another computes.

Each part runs on a stack of its own (greenlet), so that the model's code is what it is: no thread, no copy. A turn ends
where a sum has been started, and the order is the same on every rank, whatever arrives first.
"""

import contextlib
import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from narrowcast.errors import MissingDependencyError

if TYPE_CHECKING:
    from greenlet import greenlet

T = TypeVar("T")


class AbandonedError(Exception):
    """Raised in a part whose turn will not come again, as another one has failed."""


@dataclass(eq=False)
class _Part:
    place: int
    stack: "greenlet"
    num_begun: int = 0  # sums


class Turns:
    """Takes turns among parts. `enter(place)` is called before each turn, with the place of the part that goes on."""

    def __init__(self, enter: Callable[[int], None]) -> None:
        self._enter = enter
        self._parts: list[_Part] = []
        self._current: _Part | None = None

    @property
    def taken(self) -> bool:
        """Parts are taking turns now."""
        return self._current is not None

    def take(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all parts; what one of them raises, after the others have let go of what they wait for.

        Each of them computes only what the one before it has computed already, from one sum to the next: tokens find
        what earlier ones have written. Call it without gradients: torch's switch for these is the thread's.
        """
        greenlet = import_greenlet()
        results: dict[int, T] = {}

        def run(place: int, part: Callable[[], T]) -> None:
            results[place] = part()

        for place, _ in enumerate(parts):
            stack = greenlet.greenlet(run)
            stack.gr_context = contextvars.copy_context()
            self._parts.append(_Part(place, stack))
        waiting = deque(self._parts)
        try:
            while waiting:
                self._current = part = waiting.popleft()
                self._enter(part.place)
                part.stack.switch(*() if part.stack else (part.place, parts[part.place]))
                if not part.stack.dead:
                    waiting.append(part)
        except BaseException as error:
            self._abandon(waiting, drain=isinstance(error, Exception))
            raise
        finally:
            self._parts, self._current = [], None
            self._enter(0)
        return [results[place] for place in range(len(parts))]

    def begin_sum(self) -> None:
        """A sum of the part that computes has been put in."""
        if self._current is not None:
            self._current.num_begun += 1

    def pass_on(self) -> None:
        """Let the next part compute; returns when it is this one's turn again."""
        if self._current is not None:
            self._current.stack.parent.switch()

    def catch_up(self) -> None:
        """Return when the part before has computed what this one is about to: it has begun the sum after this one."""
        part = self._current
        if part is None or part.place == 0:
            return
        before = self._parts[part.place - 1]
        while not before.stack.dead and before.num_begun <= part.num_begun:
            self.pass_on()

    def _abandon(self, waiting: Sequence[_Part], *, drain: bool) -> None:
        """End the other parts. With `drain` they first wait for what travels, as all ranks do; else nobody may come."""
        greenlet = import_greenlet()
        for part in waiting:
            if part.stack:
                self._current = part
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    part.stack.throw(AbandonedError if drain else greenlet.GreenletExit)


def import_greenlet() -> Any:
    """The package; MissingDependencyError where it is not installed."""
    try:
        import greenlet
    except ModuleNotFoundError as error:
        raise MissingDependencyError("greenlet", "turns") from error
    return greenlet
