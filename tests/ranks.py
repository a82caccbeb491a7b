"""Rank processes: a world of 1, 2, 3, ... is started once and lives as long as the session."""

import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 90


class RankError(AssertionError):
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
            arguments = theirs, rank, world_size, f"{self.folder.name}/store"
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin `function(*arguments)` on every rank; `result` waits for each."""
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(*arguments)` on every rank; the results in rank order."""
        self.start(function, *arguments)
        return [self.result(rank) for rank in range(self.world_size)]

    def result(self, rank: int) -> Any:
        """What `rank` returned; RankError if it raised."""
        if not self.pipes[rank].poll(LIMIT_S):
            self.close()
            raise TimeoutError(f"rank {rank} gave no answer in {LIMIT_S} s")
        failed, value = self.pipes[rank].recv()
        if failed:
            self.close()
            raise RankError(f"rank {rank} of {self.world_size}:\n{value}")
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
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
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
        _destroy_groups()


def _destroy_groups() -> None:
    """End the groups that a function has made, as engines do for every model: each has threads that poll."""
    gc.collect()
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
