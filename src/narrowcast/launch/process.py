"""What a process that is one of several ranks does before its work and after it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from narrowcast.transport import connect

PR_SET_PDEATHSIG = 1  # linux/prctl.h

P = ParamSpec("P")
T = TypeVar("T")


def as_rank(function: Callable[P, T], timeout_s: float, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns on this rank, joined with the others within `timeout_s`, as the environment says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches whoever started the ranks, who ends them
    end_with_parent()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    connect(timeout_s=timeout_s)
    try:
        return function(*args, **kwargs)
    finally:
        dist.destroy_process_group()


def end_with_parent() -> None:
    """Even a parent that is killed does not leave this process behind (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # killed before
        sys.exit(1)
