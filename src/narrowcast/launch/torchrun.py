"""Ranks that torchrun has started: this process is one of them."""

import os
from collections.abc import Sequence

from narrowcast.errors import InvalidInputError
from narrowcast.launch.link import Link

DEFAULT_PORT = "29500"


def under_torchrun() -> bool:
    """True where torchrun, or something like it, started this process as a rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def become_rank(rank: int, hosts: Sequence[str]) -> None:
    """Make this process that rank, one on each of the hosts, as torchrun would; rank 0's holds the store.

    MASTER_PORT is that of the store, by default torchrun's.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(hosts)), MASTER_ADDR=hosts[0])
    os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)


def is_first_rank() -> bool:
    """True for the process that prints: rank 0, or one that is no rank."""
    return int(os.environ.get("RANK", 0)) == 0


def check_world(world_size: int, link: Link | None) -> None:
    """InvalidInputError unless torchrun's ranks are as many as are needed, on whatever link they have."""
    found = int(os.environ["WORLD_SIZE"])
    if found != world_size:
        raise InvalidInputError("torchrun", expected=f"{world_size} ranks", found=found, remedy="Start that many.")
    if link is not None:
        raise InvalidInputError(
            "--link", expected="ranks that are started for it", found="those of torchrun", remedy="Leave out torchrun."
        )
