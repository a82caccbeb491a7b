"""What every transport is: it moves bytes between the ranks of one group, and names a rank that is lost."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Buffers = Sequence[Tensor | None]


class Work(Protocol):
    """Bytes on their way."""

    def wait(self) -> None:
        """Return when all have arrived; PeerLostError if a peer is lost or the deadline passes."""
        ...


class Transport(ABC):
    """A group of `world_size` ranks, this one being `rank`.

    Sizes are known to both ends, buffers belong to the caller, and every wait has a deadline.
    """

    rank: int
    world_size: int

    @abstractmethod
    def exchange(self, sends: Buffers, recvs: Buffers) -> Work:
        """Start to send `sends[peer]` to each peer and to fill `recvs[peer]` from it.

        Contiguous uint8 tensors, None where nothing travels (always at `rank` itself). Every rank starts the
        same exchanges in the same order; it may wait for them in any order.
        """

    @abstractmethod
    def share(self, text: str, doing: str) -> list[str]:
        """The texts of all ranks, in rank order: for agreement at set-up. `doing` is for the error message."""
