"""Running a function on ranks that are started for it, each in its own process: on loopback, or joined by a link."""

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ParamSpec, TypeVar

from narrowcast.errors import NarrowcastError, PeerLostError
from narrowcast.launch import emulation
from narrowcast.launch.link import Link
from narrowcast.launch.process import as_rank, end_with_parent
from narrowcast.transport import DEFAULT_TIMEOUT_S

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
SETTLE_S = 1.0  # ranks that miss another one may say so before the other is seen to have failed


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its link, and the pipe to the emulator, if there is one."""

    rank: int
    world_size: int
    port: int
    link: Link | None = None
    wire: Connection | None = None

    def environment(self) -> dict[str, str]:
        """The variables by which ranks find each other, as torchrun sets them."""
        return {
            "MASTER_ADDR": "127.0.0.1" if self.link is None else emulation.address_of(0),
            "MASTER_PORT": str(self.port),
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "GLOO_SOCKET_IFNAME": "lo" if self.link is None else emulation.DEVICE,
        }


def run(
    function: Callable[P, T],
    world_size: int,
    link: Link | None = None,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """What `function(*args, **kwargs)` returns on each of `world_size` ranks, whose network is `link`.

    Function, arguments and results must be picklable. What one rank raises is raised here; all others are ended then,
    as they are by Ctrl-C and by whatever ends this process.
    """
    if link is not None:
        emulation.check_possible(world_size)
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a namespace has nobody to ask for names of hosts
    with _interrupts(held=True), ExitStack() as stack:
        guards: list[int] = []
        wires: Sequence[Connection | None] = [None] * world_size
        if link is not None:
            emulator, wires = stack.enter_context(emulation.emulated(link, world_size, context))
            guards.append(emulator.sentinel)
        ranks: dict[Connection, BaseProcess] = {}
        stack.callback(_end, ranks)
        port = _free_port()
        for rank, wire in enumerate(wires):
            ours, theirs = context.Pipe(duplex=False)
            place = Place(rank, world_size, port, link, wire)
            ranks[ours] = context.Process(target=_serve, args=(theirs, place, function, args, kwargs), daemon=True)
            ranks[ours].start()
            theirs.close()
            if wire is not None:
                wire.close()
        with _interrupts(held=False):
            return _collect(ranks, guards)


def _collect(ranks: Mapping[Connection, BaseProcess], guards: Sequence[int]) -> list[Any]:
    """The results in rank order. Who lost a peer waits a moment for that peer's own words."""
    numbers = {pipe: rank for rank, pipe in enumerate(ranks)}
    waiting, results = set(ranks), {}
    lost: PeerLostError | None = None
    while waiting:
        ready = connection.wait([*waiting, *guards], None if lost is None else SETTLE_S)
        if not ready:
            break
        for pipe in ready:
            if not isinstance(pipe, Connection):
                raise NarrowcastError("the emulator of the link ended")
            waiting.remove(pipe)
            try:
                error, results[numbers[pipe]] = pipe.recv()
            except EOFError:
                ranks[pipe].join()
                raise NarrowcastError(f"rank {numbers[pipe]} ended with status {ranks[pipe].exitcode}") from None
            if isinstance(error, PeerLostError):
                lost = error
            elif error is not None:
                raise error
    if lost is not None:
        raise lost
    return [results[rank] for rank in sorted(results)]


def _end(ranks: Mapping[Connection, BaseProcess]) -> None:
    for pipe, process in ranks.items():
        pipe.close()
        process.kill()
    for process in ranks.values():
        process.join()


def _serve(
    results: Connection, place: Place, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    end_with_parent()
    os.environ.update(place.environment())
    error: NarrowcastError | None = None
    result = None
    try:
        if place.link is not None and place.wire is not None:
            emulation.join(place.link, place.rank, place.wire)
        result = as_rank(function, DEFAULT_TIMEOUT_S, *args, **kwargs)
    except NarrowcastError as refusal:
        error = refusal
    except Exception as failure:
        logger.exception("rank %d", place.rank)
        error = NarrowcastError(f"rank {place.rank}: {type(failure).__name__}: {failure}")
    results.send((error, result))


@contextmanager
def _interrupts(*, held: bool) -> Iterator[None]:
    """Ctrl-C is for whoever started the ranks: those inherit that it is held back, and it waits until all have started
    or ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK if held else signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
