"""A pool of rank processes: each world of 1, 2, 3, ... ranks is started once and lives as long as the session."""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 90


class RankFailed(AssertionError):
    """A rank raised; its traceback is the message."""


class Ranks:
    """`world_size` processes joined by a gloo group over a FileStore. `run` calls a function on all of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "narrowcast"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, f"{self.folder.name}/store"), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *arguments: Any, each: list[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        """`function(*arguments, *each[rank])` on every rank; the results in rank order."""
        for rank, pipe in enumerate(self.pipes):
            pipe.send((function, (*arguments, *(each[rank] if each else ()))))
        return [self._result(rank) for rank in range(self.world_size)]

    def _result(self, rank: int) -> Any:
        if not self.pipes[rank].poll(LIMIT_S):
            self.close()
            raise TimeoutError(f"rank {rank} gave no answer in {LIMIT_S} s")
        failed, value = self.pipes[rank].recv()
        if failed:
            self.close()
            raise RankFailed(f"rank {rank} of {self.world_size}:\n{value}")
        return value

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        with contextlib.suppress(OSError):
            self.folder.cleanup()


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), HF_HUB_OFFLINE="1")
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))


def data(name: str) -> Path:
    """A folder of the project's shared data; see `needs_shared` in conftest."""
    return Path(__file__).parents[2] / "shared" / name
