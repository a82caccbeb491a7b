"""Ranks on this machine, each a process of its own: on loopback, or joined by an emulated link."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, Self, TypeVar, TypeVarTuple, cast

from narrowcast.errors import NarrowcastError
from narrowcast.launch import emulation
from narrowcast.launch.link import Link
from narrowcast.launch.process import Answer, Outcome, Place, Told, as_rank, serve
from narrowcast.launch.torchrun import check_world, under_torchrun
from narrowcast.progress import Progress, tell
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_timeout

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SETTLE_S = 2.0  # ranks that miss another one may say so before the other is seen to have failed

# Ranks are forked from a server that imports what this process has imported of these, once for all ranks.
PRELOADED = {"narrowcast", "transformers"}


class Ranks:
    """`world_size` processes in one group, which run function after function until `close`, or until one fails.

    They end with this process, however it ends. `num_threads` of each: by default, a share of the machine's cores.
    """

    def __init__(
        self,
        world_size: int,
        *,
        link: Link | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        num_threads: int | None = None,
    ) -> None:
        check_timeout(timeout_s)
        tell(Progress(f"starting {world_size} ranks"))
        if link is not None:
            emulation.check_possible(world_size)
        self.world_size = world_size
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self._guards: list[int] = []
        self._stack = ExitStack()
        resource_tracker.ensure_running()  # as its start lets interrupts through
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_imported())
        with self._closed_on_failure(), _interrupts(held=True):
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="narrowcast-"))
            wires: Sequence[Connection | None] = [None] * world_size
            if link is not None:
                emulator, wires = self._stack.enter_context(emulation.emulated(link, world_size, context))
                self._guards.append(emulator.sentinel)
            for rank, wire in enumerate(wires):
                place = Place(
                    rank=rank,
                    world_size=world_size,
                    store=f"{folder}/store",
                    environment=dict(os.environ),
                    timeout_s=timeout_s,
                    num_threads=num_threads,
                    link=link,
                    wire=wire,
                )
                self._start_process(context, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """True as long as all processes run."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def run(self, function: Callable[[*Ts], T], *args: *Ts) -> list[T]:
        """Results of `function(*args)` on each rank, in their order; function, arguments and results are pickled.

        Raises what the first rank to fail raised, naming it, and ends all; NarrowcastError if that was no
        NarrowcastError, with the rank's traceback as a note, or if a rank has ended. So does Ctrl-C end all.
        """
        with self._closed_on_failure():
            self.start(function, *args)
            return cast(list[T], self._collect({}))

    def run_led(self, function: Callable[[*Ts], T], *args: *Ts) -> list[T]:
        """As `run`, but the first rank is heard out whatever becomes of the others: it tells those whom it serves."""
        with self._closed_on_failure():
            self.start(function, *args)
            return cast(list[T], self._collect({0: self.answer(0)}))

    def check_alive(self) -> None:
        """Raise as `run` does where a rank has ended, of which others may hear a moment before this process does."""
        if connection.wait([process.sentinel for process in self.processes], SETTLE_S):
            with self._closed_on_failure():
                self._collect({})

    def first_told(self, kind: type[T]) -> T:
        """Wait until the first rank tells something of that `kind`, and leave all at work; raises as `run` does.

        What it tells before is told here.
        """
        with self._closed_on_failure():
            return cast(T, self._collect({}, until=kind))

    def start(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Begin `function(*args)` on every rank."""
        message = pickle.dumps((function, args))
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # it has ended: waiting for its answer will show
                pipe.send_bytes(message)

    def answer(self, rank: int) -> Answer:
        """Wait for the answer of `rank` to what was started; what it tells before is told here."""
        while isinstance(message := self._message(rank), Told):
            tell(message.said)
        return message

    def _message(self, rank: int) -> Answer | Told:
        try:
            return cast(Answer | Told, pickle.loads(self.pipes[rank].recv_bytes()))
        except (EOFError, ConnectionResetError):
            self.processes[rank].join()
            return Outcome.ENDED, NarrowcastError(f"rank {rank} {_end(self.processes[rank].exitcode)}")

    def close(self) -> None:
        """End all processes."""
        with _interrupts(held=True):
            for process in self.processes:
                process.kill()
            for process, pipe in zip(self.processes, self.pipes, strict=True):
                process.join()
                pipe.close()
            self.processes, self.pipes = [], []
            self._stack.close()

    def _start_process(self, context: ForkServerContext, place: Place) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, place), daemon=True)
        process.start()
        self.processes.append(process)
        self.pipes.append(ours)
        theirs.close()
        if place.wire is not None:
            place.wire.close()

    def _collect(self, answers: dict[int, Answer], until: type | tuple[()] = ()) -> Any:
        """The results, beside those answers that have come; they are kept in the order in which they come.

        Or what the first rank tells `until` then, if that is of this type.
        """
        worst = min((outcome for outcome, _ in answers.values()), default=Outcome.RETURNED)
        while worst > Outcome.REFUSED and len(answers) < self.world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            # Never for good: Ctrl-C just before the wait is seen only after it.
            ready = connection.wait([*waiting, *self._guards], SETTLE_S)
            if not ready and worst != Outcome.RETURNED:
                break
            for pipe in ready:
                if not isinstance(pipe, Connection):
                    raise NarrowcastError("the emulator of the link ended")
                if isinstance(message := self._message(waiting[pipe]), Told):
                    if isinstance(message.said, until):
                        return message.said
                    tell(message.said)
                else:
                    answers[waiting[pipe]] = message
            worst = min((outcome for outcome, _ in answers.values()), default=worst)
        if worst != Outcome.RETURNED:
            raise next(error for outcome, error in answers.values() if outcome == worst)
        return [answers[rank][1] for rank in range(self.world_size)]

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def run(
    function: Callable[[*Ts], T],
    world_size: int,
    *args: *Ts,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    link: Link | None = None,
) -> list[T]:
    """Results of `function(*args)` on each of `world_size` ranks, which are started for it, on `link`.

    Under torchrun the ranks are those that it started, all of which call this, and only this rank's result is known: a
    list of one. Ranks meet within `timeout_s` seconds; PeerLostError names who does not come. Else as `Ranks.run`.
    """
    if under_torchrun():
        check_world(world_size, link)
        return [as_rank(function, timeout_s, *args)]
    with Ranks(world_size, link=link, timeout_s=timeout_s) as ranks:
        return ranks.run(function, *args)


def _imported() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in PRELOADED]


def _end(status: int | None) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"


@contextmanager
def _interrupts(*, held: bool) -> Iterator[None]:
    """Ctrl-C is for this process alone: those that it starts inherit that it is held back, and it waits until all have
    started or ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK if held else signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
