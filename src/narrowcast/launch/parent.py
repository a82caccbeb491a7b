"""A process that does not outlive whoever started it, not even one that is killed (Linux)."""

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends: torchrun, or whoever holds our pipe.

    A process that was forked from a server is not a child of whoever asked for it, so their pipe tells.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # ended before
        sys.exit(1)
