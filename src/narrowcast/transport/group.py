"""The common part of transports over a process group: agreement through its store, and the handling of a loss.

The first rank that misses another writes it into the store of the whole world, where the rest find it; then it closes
all its connections, so that nobody waits for it in vain.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store, _get_process_group_store

from narrowcast.errors import InvalidInputError, PeerLostError
from narrowcast.transport.base import Collectives, Transport
from narrowcast.transport.company import Company
from narrowcast.transport.waiting import LINGER_S, answered, within

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0
LONGEST_TIMEOUT_S = 7 * 24 * 3600.0

# Of every group that a transport was made for, whichever kind: tags must not meet.
collectives_of: WeakKeyDictionary[dist.ProcessGroup, Collectives] = WeakKeyDictionary()

# Of worlds that `connect` joined: how long a wait for their ranks lasts.
patience_of: WeakKeyDictionary[dist.ProcessGroup, float] = WeakKeyDictionary()

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


class MeetingError(Exception):
    """A connection that broke while ranks waited for each other."""


class GroupTransport(Transport):
    """The ranks of `group` (None: the default group).

    A wait lasts `timeout_s` seconds at most: by default as many as `connect` was given, or 60 where it was not called.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float | None = None) -> None:
        if timeout_s is not None:
            check_timeout(timeout_s)
        if not dist.is_initialized():
            raise InvalidInputError(
                "process group",
                expected="torch.distributed to be initialised",
                found="that it is not",
                remedy="Start the ranks with torchrun and call torch.distributed.init_process_group.",
            )
        self.group = dist.distributed_c10d._group_or_default_group(group)
        world = dist.distributed_c10d._get_default_group()
        self.timeout_s = patience_of.get(world, DEFAULT_TIMEOUT_S) if timeout_s is None else timeout_s
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
            raise self.missed() from error
        return x

    def missed(self) -> PeerLostError:
        """The error for a wait in which somebody was lost, it is not known who."""
        return self.lost(self._missing_peer())

    def _missing_peer(self) -> int:
        """The first rank that does not answer a roll call; the next one of the group if all do."""
        try:
            self.share("", "adding up", timeout_s=LINGER_S)
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

    def accompanied(self, call: Callable[[], T], doing: str) -> T:
        """The result of `call`, once all ranks are done with theirs, which may take any time.

        It runs in a thread of its own; meanwhile ranks tell each other that they are alive. PeerLostError names who
        begins later than `timeout_s`, does not tell for as long, dies or fails.
        """
        ordinal = self._store.add(f"accompanied/{self.rank}", 1)
        store = PrefixStore(f"accompanied/{ordinal}", self._store)
        Company.begin(store, dist.get_rank())
        self.share("", doing)
        own = cast(Any, store).clone()  # as `call` may hold the other one up: the making of groups does
        company = Company(own, dist.get_rank(), self.global_ranks, doing, timeout_s=self.timeout_s)
        try:
            return company.work(call, self._meet)
        except MeetingError as error:
            raise self._missed_in(doing) from error

    def meet(self, doing: str) -> None:
        """Return when all ranks have come, however late; PeerLostError names one whose connection breaks."""
        try:
            self._meet()
        except MeetingError as error:
            raise self._missed_in(doing) from error

    def _missed_in(self, doing: str) -> PeerLostError:
        return PeerLostError(self.missed().ranks, doing)

    def _meet(self) -> None:
        """Return when all ranks have come, however late; MeetingError if a connection breaks."""
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=LONGEST_TIMEOUT_S)
        try:
            self.group.allreduce([torch.zeros(1)], options).wait(options.timeout)
        except RuntimeError as error:
            raise MeetingError from error

    def lost(self, peer: int) -> PeerLostError:
        """The error for a peer that failed us: it names the rank that was lost first, which may have taken it along.

        Ranks are those of the whole world: the first to be lost may be in another group.
        """
        mine = str(self.global_ranks[peer])
        try:
            first = within(LINGER_S, lambda: self._world_store.compare_set("lost", "", mine).decode())
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
        store.wait([f"{key}/looked" for key in keys if int(key) not in missing], timedelta(seconds=LINGER_S))
    return missing
