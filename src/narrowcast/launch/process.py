"""A process that is a rank: it meets the others, runs what it is given, and answers."""

import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection
from typing import Any, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store
from torch.distributed.distributed_c10d import _world

from narrowcast.errors import NarrowcastError, PeerLostError
from narrowcast.launch import emulation
from narrowcast.launch.link import Link
from narrowcast.launch.parent import end_with_parent
from narrowcast.progress import heard_by
from narrowcast.transport import TorchDistributedTransport, connect

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Outcome(IntEnum):
    """Outcome of a rank's work, the cause of others first: whoever misses a rank fails because of it."""

    ENDED = 0
    REFUSED = 1
    CRASHED = 2
    MISSED = 3
    RETURNED = 4


Answer = tuple[Outcome, Any]  # and the result or the error


@dataclass(frozen=True)
class Told:
    """Something that the first rank tells while it runs."""

    said: object


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs, with the environment that whoever starts it has; `wire` leads to the emulator of `link`."""

    rank: int
    world_size: int
    store: str
    environment: Mapping[str, str]
    timeout_s: float
    num_threads: int | None
    link: Link | None
    wire: Connection | None

    def enter(self) -> None:
        """Make this process that rank, as torchrun would, and move it onto its link."""
        os.environ.clear()
        os.environ.update(self.environment)
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(self.rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(self.world_size)
        if self.link is None or self.wire is None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = emulation.DEVICE
            emulation.join(self.link, self.rank, self.wire)


def share_of_cores() -> int:
    """The threads that a rank computes with, unless told otherwise: its share of this machine's cores."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def as_rank(function: Callable[[*Ts], T], timeout_s: float, *args: *Ts) -> T:
    """Run `function` on this rank of torchrun's, which meets the others within `timeout_s`; returns its result."""
    end_with_parent()
    with _joined(timeout_s), _losses_named():
        return function(*args)


def serve(pipe: Connection, place: Place) -> None:
    """Run one pickled function after another, until whoever sends them is gone."""
    end_with_parent()
    try:
        place.enter()
        store = FileStore(place.store, place.world_size)
        with _joined(place.timeout_s, store, place.num_threads), _heard(pipe, place.rank):
            gc.freeze()
            while True:
                message = pipe.recv_bytes()
                _destroy_groups()
                pipe.send_bytes(_answer(message, place.rank))
    except EOFError:
        pass
    except Exception as error:  # before there was anything to run
        pipe.send_bytes(pickle.dumps(_failure(error, place.rank)))


def _heard(pipe: Connection, rank: int) -> AbstractContextManager[None]:
    """Whoever holds the other end of the first rank's pipe hears what it tells."""
    return heard_by(lambda said: pipe.send_bytes(pickle.dumps(Told(said)))) if rank == 0 else nullcontext()


@contextmanager
def _joined(timeout_s: float, store: Store | None = None, num_threads: int | None = None) -> Iterator[None]:
    """The group of all ranks as the default one, and a share of the machine's threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches whoever started the ranks, who ends them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(num_threads or share_of_cores())
    connect(timeout_s=timeout_s, store=store)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _losses_named() -> Iterator[None]:
    """PeerLostError in place of what a backend raises in a wait of the engine's own, without the name of a rank."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise TorchDistributedTransport().missed() from error
        raise


def _destroy_groups() -> None:
    """The groups of the function before, with which all ranks are done: each of gloo's wakes up 100 times a second."""
    for group in list(_world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    if "torch.distributed.tensor" in sys.modules:  # whose caches take an equal mesh of before for the next one
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    gc.collect()


def _answer(message: bytes, rank: int) -> bytes:
    try:
        function, args = pickle.loads(message)
        with _losses_named():
            result = function(*args)
        return pickle.dumps((Outcome.RETURNED, result))
    except Exception as error:
        return pickle.dumps(_failure(error, rank))


def _failure(error: Exception, rank: int) -> Answer:
    """The error as whoever started the ranks raises it: one sentence that names the rank."""
    if isinstance(error, PeerLostError):
        return Outcome.MISSED, error
    if isinstance(error, NarrowcastError):
        error.args = (f"rank {rank}: {error}",)
        return Outcome.REFUSED, error
    crash = NarrowcastError(f"rank {rank}: {type(error).__name__}: {error}")
    crash.add_note(traceback.format_exc())
    return Outcome.CRASHED, crash
