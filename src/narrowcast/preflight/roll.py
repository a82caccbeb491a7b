"""The ranks that have come, as rank 0 counts them in the store at MASTER_ADDR: all that they share so far."""

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import PrefixStore

from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError
from narrowcast.progress import Progress, tell
from narrowcast.transport.address import loops
from narrowcast.transport.torch_distributed import meeting_place
from narrowcast.transport.waiting import LINGER_S, answered

T = TypeVar("T")

LOOK_S = 0.02  # between looks at who has come


class Roll:
    """This rank among those of its world. `hosts` of the ranks, where they are known; () under torchrun.

    They meet in the `store`, HOST:PORT. A call waits `timeout_s` seconds for the ranks that are here; `missing`: who
    did not come, by what they were called for. InvalidInputError where rank 0 is not reached.
    """

    def __init__(self, hosts: Sequence[str] = (), *, timeout_s: float) -> None:
        self.hosts, self.timeout_s = hosts, timeout_s
        self.store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.here = list(range(self.world_size))
        self.missing: dict[int, str] = {}
        tell(Progress("meeting the other ranks"))
        try:
            self._store = PrefixStore("preflight", meeting_place(self.rank, timeout_s))
        except PeerLostError as error:
            raise _unreached(error.__cause__) from error

    def call(self, doing: str, said: Any, *, within_s: float = 0.0) -> dict[int, Any]:
        """JSON values that the ranks say, by rank; who has not said any is no longer here.

        `within_s`: that their work may differ by, besides the deadline. NarrowcastError for who comes too late.
        """
        timeout_s = self.timeout_s + within_s
        with _lost_with_rank_0(doing):
            self._ask(lambda: self._store.set(f"{doing}/{self.rank}", json.dumps(said)), doing)
            if self.rank == 0:
                here = self._come(doing, timeout_s)
                self._ask(lambda: self._store.set(doing, json.dumps(here)), doing)
            else:
                here = json.loads(self._got(doing, timeout_s + 2 * LINGER_S))
            if self.rank not in here:
                raise _too_late(self.rank, self.timeout_s)
            self.missing |= dict.fromkeys(set(self.here) - set(here), doing)
            self.here = here
            return {each: json.loads(self._got(f"{doing}/{each}", LINGER_S)) for each in here}

    def close(self) -> None:
        """Return when rank 0 is done, and rank 0 when the others know: with it goes the store."""
        with contextlib.suppress(NarrowcastError), _lost_with_rank_0("ending"):
            self.call("ending", None)
            self._ask(lambda: self._store.set(f"ended/{self.rank}", ""), "ending")
            if self.rank == 0:
                self._come("ended", LINGER_S)

    def _come(self, doing: str, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while True:
            come = [rank for rank in self.here if self._store.check([f"{doing}/{rank}"])]
            if come == self.here or time.monotonic() > deadline:
                return come
            time.sleep(LOOK_S)

    def _got(self, key: str, timeout_s: float) -> str:
        def get() -> bytes:
            self._store.wait([key], timedelta(seconds=timeout_s))
            return bytes(self._store.get(key))

        return answered(get, key, timeout_s=timeout_s).decode()

    def _ask(self, question: Callable[[], T], doing: str) -> T:
        return answered(question, doing, timeout_s=self.timeout_s)


@contextmanager
def _lost_with_rank_0(doing: str) -> Iterator[None]:
    """PeerLostError where the store says nothing any more."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError([0], doing) from error


def _unreached(cause: BaseException | None) -> InvalidInputError:
    """The error for a rank that does not reach the store, of rank 0's host."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    reason = (cause.strerror if isinstance(cause, OSError) else None) or "no answer"
    remedy = f"Start rank 0 there; if it runs, let no firewall keep this host from port {port} (MASTER_PORT) of it."
    if looped := loopback_of(host):
        reason += f", as {host} leads to {looped} here"
        remedy = f"{without_loopback(host)} {remedy}"
    return InvalidInputError("rank 0", expected=f"its store at {host}:{port}", found=reason.lower(), remedy=remedy)


def loopback_of(name: str) -> str | None:
    """The loopback address that a name leads to on this host; None for another one, or what is no name."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return None
    with contextlib.suppress(OSError):
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        return next(filter(loops, addresses), None)
    return None


def without_loopback(name: str) -> str:
    """A remedy for a name that leads to loopback."""
    return f"In /etc/hosts of that host, give {name} the address by which others reach it."


def _too_late(rank: int, timeout_s: float) -> NarrowcastError:
    return InvalidInputError(
        f"rank {rank}",
        expected=f"it to come within {timeout_s:g} s of rank 0",
        found="that rank 0 waits no longer",
        remedy="Start all ranks again, with a longer --timeout.",
    )
