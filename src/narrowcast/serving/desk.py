"""The desk between those who ask and the model: places for requests, of which there are so many and no more.

Clients' threads hand requests in and withdraw them; the model's thread takes them, one by one, as it has room.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from threading import Condition

from narrowcast.serving.figures import Figures, Life
from narrowcast.serving.requests import Failure, Piece, Request

Hear = Callable[[Piece | Failure], None]


@dataclass(frozen=True)
class Place:
    """A request's place: its name, who hears what comes of it, in the model's thread, and its times."""

    name: str
    request: Request
    hear: Hear
    life: Life


class FullError(Exception):
    """All places are taken."""


class ClosedError(Exception):
    """No more requests are taken; says why."""


class Desk:
    """Places for `max_running` requests that run and `max_waiting` that wait, of `max_len` tokens each at most."""

    def __init__(self, *, max_running: int, max_waiting: int, max_len: int) -> None:
        self.max_running, self.num_places = max_running, max_running + max_waiting
        self._names = itertools.count()
        self._changed = Condition()
        self._waiting: deque[Place] = deque()
        self._running: dict[str, Place] = {}
        self._withdrawn: list[str] = []  # of those that run
        self._woken = False
        self._figures = Figures(max_len=max_len)
        self._closed: str | None = None
        self._deadline = float("inf")

    @property
    def num_running(self) -> int:
        """Requests with the model."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests before it."""
        return len(self._waiting)

    @property
    def closed(self) -> str | None:
        """The reason why no more requests are taken; None while they are."""
        return self._closed

    def figures(self) -> Figures:
        """Figures of all requests so far, as they are now."""
        with self._changed:
            return deepcopy(self._figures)

    # Clients' threads

    def hand_in(self, requests: Sequence[tuple[Request, Hear]]) -> list[str]:
        """Names of requests, which all get a place, or none does: FullError, ClosedError."""
        with self._changed:
            if self._closed is not None:
                raise ClosedError(self._closed)
            if len(self._running) + len(self._waiting) + len(requests) > self.num_places:
                self._figures.num_refused += 1
                raise FullError
            now = time.monotonic()
            places = [
                Place(str(next(self._names)), request, hear, Life(len(request.prompt), now))
                for request, hear in requests
            ]
            self._waiting.extend(places)
            self._changed.notify()
            return [place.name for place in places]

    def withdraw(self, names: Sequence[str]) -> None:
        """Give places back, of requests that are not answered yet; nothing more is heard of those."""
        gone = set(names)
        with self._changed:
            staying = deque(place for place in self._waiting if place.name not in gone)
            running = [name for name in names if self._running.pop(name, None) is not None]
            self._figures.give_up("abort", len(self._waiting) - len(staying) + len(running))
            self._waiting = staying
            self._withdrawn += running
            self._changed.notify()

    def wake(self) -> None:
        """Have the model's thread take a step, though there may be nothing to do."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self, reason: str, *, within_s: float) -> None:
        """Take no more requests; those that are here are answered, unless that takes longer than `within_s`."""
        # No lock: a signal may have interrupted whoever holds it, in the same thread.
        self._deadline = min(self._deadline, time.monotonic() + within_s)
        self._closed = self._closed or reason

    # The model's thread

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to do, or after that time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._withdrawn or self._woken or self._closed is not None, timeout_s
            )
            self._woken = False

    def next(self) -> Place | None:
        """The request that comes next, if there is one and it may run."""
        with self._changed:
            if not self._waiting or len(self._running) >= self.max_running:
                return None
            place = self._waiting.popleft()
            place.life.begun = time.monotonic()
            self._running[place.name] = place
            return place

    def withdrawn(self) -> list[str]:
        """Those that ran and were withdrawn since this was asked last."""
        with self._changed:
            names, self._withdrawn = self._withdrawn, []
            return names

    def say(self, name: str, piece: Piece) -> None:
        """Let whoever asked hear more; the last piece frees the place."""
        with self._changed:
            place = self._running.get(name) if piece.finish is None else self._running.pop(name, None)
            if place is not None:
                self._figures.hear(place.life, piece, time.monotonic())
        if place is not None:
            place.hear(piece)

    @property
    def done(self) -> bool:
        """True when it is closed, and nobody is left, or the time is over."""
        if self._closed is None:
            return False
        return not (self._running or self._waiting) or time.monotonic() >= self._deadline

    def fail(self, message: str) -> None:
        """Close, and let all who are left hear that it failed."""
        with self._changed:
            self._closed = message
            places = [*self._running.values(), *self._waiting]
            self._figures.give_up("error", len(places))
            self._running.clear()
            self._waiting.clear()
        for place in places:
            place.hear(Failure(message))
