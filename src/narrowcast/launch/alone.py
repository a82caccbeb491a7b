"""The first rank at work alone, with all cores of its machine, while the others wait."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from narrowcast.transport.group import GroupTransport

T = TypeVar("T")

ON_THIS_HOST = "LOCAL_WORLD_SIZE"


def alone(ranks: GroupTransport, call: Callable[[], T], doing: str) -> T | None:
    """The result of `call` on the first rank, which may take any time; None on the others, which wait for it."""
    return ranks.accompanied(call if ranks.rank == 0 else lambda: None, doing)


@contextmanager
def with_cores(num_cores: int) -> Iterator[None]:
    """So many threads for PyTorch and for our kernels, more than this rank's share perhaps."""
    num_threads, num_ranks = torch.get_num_threads(), os.environ.get(ON_THIS_HOST)
    os.environ[ON_THIS_HOST] = "1"
    torch.set_num_threads(num_cores)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if num_ranks is None:
            del os.environ[ON_THIS_HOST]
        else:
            os.environ[ON_THIS_HOST] = num_ranks


def cores_of_host() -> int:
    """The cores that all ranks of this machine share."""
    return os.cpu_count() or 1
