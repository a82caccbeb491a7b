"""Ranks at work that may take any time, such as loading a model, and that tell each other meanwhile that they live."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from narrowcast.errors import PeerLostError
from narrowcast.transport.waiting import answered, started

T = TypeVar("T")

SIGNS = 4  # of life in the time after which a silent rank is lost
FAILED = "failed"


class Company:
    """The `ranks` of the world of which each writes signs of life into `store`, in which all have begun to."""

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], doing: str, *, timeout_s: float) -> None:
        self._store, self._own, self._doing, self._timeout_s = store, str(rank), doing, timeout_s
        self._others = [str(each) for each in ranks if each != rank]
        self._signs = itertools.count()
        self._heard = dict.fromkeys(self._others, ("", time.monotonic()))

    @staticmethod
    def begin(store: Store, rank: int) -> None:
        """Give the first sign."""
        store.set(str(rank), "")

    def work(self, call: Callable[[], T], meet: Callable[[], object]) -> T:
        """The result of `call`, once all ranks are done and `meet`; PeerLostError for those that are silent or failed.

        Raises what `meet` raises, as it does when a rank is gone.
        """
        future = started(call)
        self._until(future)
        if future.exception():
            self._say(FAILED)
        result, meeting = future.result(), started(meet)
        self._until(meeting)
        if meeting.exception():  # perhaps of a rank that had failed
            self._listen()
        meeting.result()
        return result

    def _until(self, future: Future[Any]) -> None:
        """Give signs of life, and look for those of the others, until that is done."""
        while not futures.wait([future], self._timeout_s / SIGNS).done:
            self._say(str(next(self._signs)))
            self._listen()

    def _say(self, sign: str) -> None:
        self._ask(lambda: self._store.set(self._own, sign))

    def _listen(self) -> None:
        """Hear what the others have said last."""
        now, said = time.monotonic(), self._ask(lambda: [self._store.get(other).decode() for other in self._others])
        for other, sign in zip(self._others, said, strict=True):
            if sign != self._heard[other][0]:
                self._heard[other] = sign, now
        lost = [
            int(other)
            for other, (sign, since) in self._heard.items()
            if sign == FAILED or now - since > self._timeout_s
        ]
        if lost:
            raise PeerLostError(lost, self._doing)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return answered(question, self._doing, timeout_s=self._timeout_s)
        except RuntimeError as error:
            if isinstance(error, PeerLostError):
                raise
            raise PeerLostError([0], self._doing) from error  # who held the store has ended
