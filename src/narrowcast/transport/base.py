"""The interface of transports, which move bytes between the ranks of one group and name a rank that is lost."""

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

CARD_NBYTES = 256  # of a message that compares codecs

Buffers = Sequence[Tensor | None]


class Work(Protocol):
    """Bytes on their way."""

    def wait(self) -> None:
        """Return when all have arrived; PeerLostError if a peer is lost or the deadline passes."""
        ...


@dataclass
class Collectives:
    """The collectives of a group: their numbers, alike on every rank that starts the same ones in the same order,
    and those that are under way. `between`: numbers of the transfers from one rank to another, alike on these two.
    `agreed`: digests of the codecs that all ranks are known to have; `announced`: of those of transfers.
    """

    numbers: Iterator[int] = field(default_factory=itertools.count)
    between: defaultdict[tuple[int, int], Iterator[int]] = field(default_factory=lambda: defaultdict(itertools.count))
    under_way: dict[int, Any] = field(default_factory=dict)
    agreed: set[bytes] = field(default_factory=set)
    announced: defaultdict[tuple[int, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))


class Transport(ABC):
    """A group of `world_size` ranks, this one being `rank`.

    Sizes are known to both ends, buffers belong to the caller, and every wait has a deadline.
    `chunk_values`: the values to code and send at a time, so that both overlap; None for all at once, where a message
    costs more than that gains. A number of bytes would cut tensors of other codecs elsewhere, and tokens would change
    their owner from one sum to the next.
    """

    rank: int
    world_size: int
    collectives: Collectives
    name: ClassVar[str] = "custom"
    chunk_values: ClassVar[int | None] = None

    @abstractmethod
    def exchange(self, sends: Buffers, recvs: Buffers, *, tag: int) -> Work:
        """Start to send `sends[peer]` to each peer and to fill `recvs[peer]` from it.

        Contiguous uint8 tensors, None where nothing travels (always at `rank` itself). What was sent under a tag
        is received under that tag.
        """

    @abstractmethod
    def native_all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks in place, by whatever the group has for that; PeerLostError if a rank is lost."""

    @abstractmethod
    def share(self, text: str, doing: str) -> list[str]:
        """The texts of all ranks, in rank order: for agreement at set-up. `doing` is for the error message."""
