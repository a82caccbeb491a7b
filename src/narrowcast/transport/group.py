"""The common part of transports over a process group: agreement through its store, and the handling of a loss.

The first rank that misses another writes it into the store of the whole world, where the rest find it; then it closes
all its connections, so that nobody waits for it in vain.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store, _get_process_group_store

from narrowcast.errors import InvalidInputError, PeerLostError
from narrowcast.transport.base import Collectives, Transport

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0
LONGEST_TIMEOUT_S = 7 * 24 * 3600.0
LINGER = timedelta(seconds=3)

# Of every group that a transport was made for, whichever kind: tags must not meet.
collectives_of: WeakKeyDictionary[dist.ProcessGroup, Collectives] = WeakKeyDictionary()

# Each closes all connections of its kind, in all groups of this process.
hang_ups: list[Callable[[], None]] = []


def check_timeout(timeout_s: float) -> None:
    """InvalidInputError unless it is a number of seconds above nothing, up to a week: before a group is used for it."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise InvalidInputError(
            "timeout_s",
            expected=f"seconds above 0, up to {LONGEST_TIMEOUT_S:.0f}",
            found=repr(timeout_s),
            remedy=f"Pass {DEFAULT_TIMEOUT_S:g}, say.",
        )


class GroupTransport(Transport):
    """The ranks of `group` (None: the default group). A wait lasts `timeout_s` seconds at most."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        check_timeout(timeout_s)
        if not dist.is_initialized():
            raise InvalidInputError(
                "process group",
                expected="torch.distributed to be initialised",
                found="that it is not",
                remedy="Start the ranks with torchrun and call torch.distributed.init_process_group.",
            )
        self.group = dist.distributed_c10d._group_or_default_group(group)
        self.timeout_s = timeout_s
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise InvalidInputError(
                "process group",
                expected="one that this rank is in",
                found="another",
                remedy="Call it on its ranks only.",
            )
        self.global_ranks = dist.get_process_group_ranks(self.group)
        self._store = PrefixStore("narrowcast", _get_process_group_store(self.group))
        self._world_store = PrefixStore("narrowcast", _get_default_store())
        self.collectives = collectives_of.setdefault(self.group, Collectives())

    def native_all_reduce(self, x: Tensor) -> Tensor:
        work = dist.all_reduce(x, group=self.group, async_op=True)
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:  # it does not say which rank
            raise self.lost(self._missing_peer()) from error
        return x

    def _missing_peer(self) -> int:
        """The first rank that does not answer a roll call; the next one of the group if all do."""
        try:
            self.share("", "adding up", timeout_s=LINGER.total_seconds())
        except PeerLostError as error:
            missing = [peer for peer, rank in enumerate(self.global_ranks) if rank in error.ranks]
            if missing:
                return missing[0]
        return (self.rank + 1) % self.world_size

    def share(self, text: str, doing: str, *, timeout_s: float | None = None) -> list[str]:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s

        def call() -> list[str]:
            ordinal = self._store.add(f"shares/{self.rank}", 1)  # kept by the store: groups may come and go on it
            store = PrefixStore(f"share/{ordinal}", self._store)
            return roll_call(store, dist.get_rank(), self.global_ranks, text, doing, timeout_s=timeout_s)

        return answered(call, doing, timeout_s=timeout_s)

    def lost(self, peer: int) -> PeerLostError:
        """The error for a peer that failed us: it names the rank that was lost first, which may have taken it along.

        Ranks are those of the whole world: the first to be lost may be in another group.
        """
        mine = str(self.global_ranks[peer])
        try:
            first = within(LINGER.total_seconds(), lambda: self._world_store.compare_set("lost", "", mine).decode())
        except (RuntimeError, TimeoutError):  # the store is gone, or hangs, with rank 0: its peers see that themselves
            first = mine if 0 in self.global_ranks else "0"
        logger.error("rank %d: lost rank %s", dist.get_rank(), first)
        for hang_up in hang_ups:
            hang_up()
        return PeerLostError([int(first)], "exchanging payloads")


def roll_call(
    store: Store, rank: int, ranks: Sequence[int], text: str, doing: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[str]:
    """The texts of `ranks`, `rank` being one of them; PeerLostError names those who do not come in time."""
    store.set(str(rank), text)
    keys = [str(other) for other in ranks]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = _missing(store, rank, keys)
        logger.error("rank %d: ranks %s did not come (%s)", rank, missing, doing)
        raise PeerLostError(missing, doing) from error
    return [store.get(key).decode() for key in keys]


def _missing(store: Store, rank: int, keys: list[str]) -> list[int]:
    """Ranks without a key. Who is there stays until all of those have looked: one of them may hold the store."""
    try:
        missing = [int(key) for key in keys if not store.check([key])]
    except RuntimeError:
        return [0]  # the store is gone, and with it the rank that held it
    with contextlib.suppress(RuntimeError):
        store.set(f"{rank}/looked", "")
        store.wait([f"{key}/looked" for key in keys if int(key) not in missing], LINGER)
    return missing


def answered(call: Callable[[], T], doing: str, *, timeout_s: float) -> T:
    """Call `call`, which asks the store and ends within `timeout_s` if that answers; PeerLostError for its holder."""
    try:
        return within(timeout_s + 2 * LINGER.total_seconds(), call)
    except TimeoutError as error:
        raise PeerLostError([0], doing) from error


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """Call `call`; TimeoutError if that takes too long, which goes on in a thread of its own.

    For what has no deadline of its own, such as calls of a store, or may stay beyond it.
    """
    done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((True, call()))
        except Exception as error:
            done.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        succeeded, value = done.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
    if not succeeded:
        raise value
    return cast(T, value)
