"""Where a model answers, and what an answer takes there."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from narrowcast.launch import Link, Ranks
from narrowcast.launch.emulation import DEVICE

TIMEOUT_S = 300  # distributed-llama sends its weights first
TRANSMITTED = 8  # the place of that figure in a line of /proc/net/dev


@dataclass(frozen=True)
class Place:
    """Nodes of `num_threads` each, on a link or on loopback."""

    num_nodes: int
    num_threads: int
    link: Link | None = None

    def ranks(self) -> Ranks:
        """A process for each node, in a network namespace of its own where there is a link."""
        return Ranks(self.num_nodes, link=self.link, num_threads=self.num_threads, timeout_s=TIMEOUT_S)

    def __str__(self) -> str:
        if self.num_nodes == 1:
            return f"1 node, {self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.num_nodes} nodes, {self.link or 'loopback'}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Seconds of the prompt; milliseconds of each token after it, and bytes that a node sends for it, in the mean.

    NaN bytes: not counted, as on loopback.
    """

    prompt_s: float
    ms_per_token: float
    bytes_per_token: float = math.nan


def sent_bytes(processes: Iterable[int]) -> float:
    """Bytes that these processes have sent by the counters of their interfaces on the link; NaN on loopback."""
    return sum(map(_sent, processes))


def _sent(process: int) -> float:
    for line in Path(f"/proc/{process}/net/dev").read_text(encoding="ascii").splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == DEVICE:
            return int(figures.split()[TRANSMITTED])
    return math.nan
