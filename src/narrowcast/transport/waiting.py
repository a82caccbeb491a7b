"""Deadlines for what has none of its own, such as calls of a store."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from narrowcast.errors import PeerLostError

T = TypeVar("T")

LINGER_S = 3.0  # that ranks stay for others who look who is there


def started(call: Callable[[], T]) -> Future[T]:
    """The outcome of `call`, which runs in a thread of its own that nobody waits for in the end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """The result of `call`; TimeoutError if that takes too long, while it goes on."""
    return started(call).result(timeout_s)


def answered(call: Callable[[], T], doing: str, *, timeout_s: float) -> T:
    """The result of `call`, which a store that answers ends within `timeout_s`; PeerLostError for who holds one that
    does not.
    """
    try:
        return within(timeout_s + 2 * LINGER_S, call)
    except TimeoutError as error:
        raise PeerLostError([0], doing) from error
