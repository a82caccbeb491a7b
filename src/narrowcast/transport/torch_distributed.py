"""Any `torch.distributed` group as a transport: pairwise sends and receives, whatever the backend.

On gloo that is 2.5 to 3 times faster per byte than its `all_gather`.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store, _get_process_group_store, _set_pg_timeout

from narrowcast.errors import InvalidInputError, PeerLostError
from narrowcast.transport.base import Buffers, Collectives, Transport

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0
ENGINE_TIMEOUT = timedelta(hours=2)
LINGER = timedelta(seconds=3)

# Tags keep exchanges apart that are under way at once, and apart from the engine's own messages (tag 0 and up).
_FIRST_TAG, _NUM_TAGS = 1 << 30, 1 << 29
_HANG_UP_TAG = _FIRST_TAG - 1
_collectives: WeakKeyDictionary[dist.ProcessGroup, Collectives] = WeakKeyDictionary()


class TorchDistributedTransport(Transport):
    """The ranks of `group` (None: the default group). A wait lasts `timeout_s` seconds at most."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
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
        self._store = PrefixStore("narrowcast", _get_process_group_store(self.group))
        self._world_store = PrefixStore("narrowcast", _get_default_store())
        self._global_ranks = dist.get_process_group_ranks(self.group)
        self.collectives = _collectives.setdefault(self.group, Collectives())

    def exchange(self, sends: Buffers, recvs: Buffers, *, tag: int) -> "TorchDistributedWork":
        tag = _FIRST_TAG + tag % _NUM_TAGS
        sending, receiving = _travelling(sends), _travelling(recvs)
        work = TorchDistributedWork(self, [], time.monotonic() + self.timeout_s)
        if any(buffer.is_cuda for _, buffer in receiving + sending):
            # NCCL must see sends and receives as one batch, knows no tags (ranks wait in one order), wants all ranks
            # in a group's first batch, and has its own watchdog for lost peers.
            batch = [dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=peer) for peer, buffer in receiving]
            batch += [dist.P2POp(dist.isend, buffer, group=self.group, group_peer=peer) for peer, buffer in sending]
            work.pending += [(None, started) for started in dist.batch_isend_irecv(batch)]
            return work
        transfers = [(self.group.recv, *each) for each in receiving] + [(self.group.send, *each) for each in sending]
        for start, peer, buffer in transfers:
            try:
                work.pending.append((peer, start([buffer], peer, tag)))
            except RuntimeError as error:
                raise self.lost(peer) from error
        return work

    def native_all_reduce(self, x: Tensor) -> Tensor:
        work = dist.all_reduce(x, group=self.group, async_op=True)
        try:
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:  # it does not say which rank
            raise self.lost(self._who_is_missing()) from error
        return x

    def _who_is_missing(self) -> int:
        """A rank that does not answer a roll call, or, if all do, the next one."""
        try:
            self.share("", "adding up natively")
        except PeerLostError as error:
            return self._global_ranks.index(error.ranks[0]) if error.ranks[0] in self._global_ranks else 0
        return (self.rank + 1) % self.world_size

    def share(self, text: str, doing: str) -> list[str]:
        def call() -> list[str]:
            ordinal = self._store.add(f"shares/{self.rank}", 1)  # kept by the store: groups may come and go on it
            store = PrefixStore(f"share/{ordinal}", self._store)
            return roll_call(store, dist.get_rank(), self._global_ranks, text, doing, timeout_s=self.timeout_s)

        try:
            return _within(self.timeout_s + 2 * LINGER.total_seconds(), call)
        except TimeoutError as error:  # the store does not answer: whoever holds it hangs
            raise PeerLostError([0], doing) from error

    def lost(self, peer: int) -> PeerLostError:
        """The error for a peer that failed us: it names the rank that was lost first, which may have taken it along.

        Ranks are those of the whole world: the first to be lost may be in another group.
        """
        mine = str(self._global_ranks[peer])
        try:
            first = _within(LINGER.total_seconds(), lambda: self._world_store.compare_set("lost", "", mine).decode())
        except (RuntimeError, TimeoutError):  # the store is gone, or hangs, with rank 0: its peers see that themselves
            first = mine if 0 in self._global_ranks else "0"
        logger.error("rank %d: lost rank %s", dist.get_rank(), first)
        _hang_up()
        return PeerLostError([int(first)], "exchanging payloads")


def _hang_up() -> None:
    """Close all connections of all groups, so that peers who wait for this rank learn of it now and not at their
    deadline, in whichever group they wait.
    """
    for group in [group for group in _collectives if group in dist.distributed_c10d._world.pg_map]:
        for peer in set(range(group.size())) - {group.rank()}:
            with contextlib.suppress(RuntimeError):  # gloo closes the connection of a wait that runs out of time
                nothing = torch.empty(1, dtype=torch.uint8)
                group.recv([nothing], peer, _HANG_UP_TAG).wait(timedelta(milliseconds=1))


@dataclass
class TorchDistributedWork:
    """Receives, then sends, each in the order of ranks; `pending` names the peer of each where it is known."""

    transport: TorchDistributedTransport
    pending: list[tuple[int | None, dist.Work]]
    deadline: float

    def wait(self) -> None:
        """Return when all have arrived; PeerLostError if a peer is lost or the deadline passes."""
        for peer, work in self.pending:
            if peer is None:
                work.wait()
                continue
            try:
                work.wait(timedelta(seconds=max(self.deadline - time.monotonic(), 0.001)))
            except RuntimeError as error:
                raise self.transport.lost(peer) from error
        self.pending.clear()


def connect(*, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Join the ranks that torchrun started, as its environment variables say. PeerLostError names who does not come.

    Does nothing where torch.distributed is initialised. Until all have come, the store is all that they share.
    """
    if dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not hosted_by_agent,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise PeerLostError([0], "joining the group") from error
    attempt = PrefixStore(f"narrowcast/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    ranks = range(world_size)
    roll_call(PrefixStore("roll", attempt), rank, ranks, "", "joining the group", timeout_s=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:  # somebody was lost between the roll call and here: who is still there?
        roll_call(PrefixStore("again", attempt), rank, ranks, "", "joining the group", timeout_s=timeout_s / 4)
        raise PeerLostError([], "joining the group") from error
    # The engine's own waits, while ranks load a large model at different speeds, are not ours to cut short.
    _set_pg_timeout(ENGINE_TIMEOUT)


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


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """What `call` returns; TimeoutError if that takes too long. Calls of a store have no deadline of their own."""
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


def _travelling(buffers: Buffers) -> list[tuple[int, Tensor]]:
    return [(peer, buffer) for peer, buffer in enumerate(buffers) if buffer is not None and buffer.numel()]
