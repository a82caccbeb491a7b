"""Algorithms: steps that yield exchanges, a one-process twin, the bytes that are sent, and the work that is done.

An algorithm knows no codec's inside and no transport: it encodes, yields an `Exchange`, and goes on when the
bytes have arrived. Whoever drives it may wait at once or later, let the steps of several chunks of tokens take turns,
and counts what travels.

Shapes: T tokens, E features, R ranks, B payload bytes of a token.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.errors import InvalidInputError
from narrowcast.transport import Buffers, Work


class Exchange(NamedTuple):
    """Payloads to each peer and room for theirs; `num_values` values travel in the `sends`."""

    sends: Buffers
    recvs: Buffers
    num_values: int


class Traffic(NamedTuple):
    """The bytes of payloads that one rank sends, and the values coded in them."""

    nbytes: int
    num_values: int


@dataclass(frozen=True)
class Sent:
    """The traffic of one rank in a collective, by hop (`Hops`)."""

    by_hop: tuple[Traffic, ...]

    @cached_property
    def total(self) -> Traffic:
        """That of all hops."""
        return Traffic(sum(each.nbytes for each in self.by_hop), sum(each.num_values for each in self.by_hop))

    @property
    def nbytes(self) -> int:
        """Bytes of all hops."""
        return self.total.nbytes

    @classmethod
    def once(cls, nbytes: int, num_values: int) -> Self:
        """Values that travel once."""
        return cls((Traffic(nbytes, num_values),))


class Begin(NamedTuple):
    """An exchange to start, and not to wait for: the step's value is its Work, to be yielded when it is wanted."""

    exchange: Exchange


# Yielded: an exchange to wait for, one to begin, or the Work of one that was begun.
Steps = Generator[Exchange | Begin | Work, Any, Tensor]
Filling = Generator[Exchange, None, None]


@dataclass(frozen=True)
class Deferred:
    """A tensor [T, E] of which `tokens(own)` gives some, computed when they are about to travel."""

    num_tokens: int
    num_features: int
    tokens: Callable[[slice], Tensor]

    @classmethod
    def of(cls, x_TE: Tensor) -> Self:
        """A tensor that is there already."""
        return cls(x_TE.shape[0], x_TE.shape[1], x_TE.__getitem__)


@dataclass(frozen=True)
class Hops:
    """The codecs of a site by hop, and the nodes that its ranks sit in.

    `codecs`: [0] for the partial sums, [1] for the reduced value when it travels again, [2] for the sums of nodes.
    `groups`: the ranks of each node, ascending; empty where all ranks are alike.
    `unit`: features that stay together where features are cut, besides those that the codecs keep together.
    """

    codecs: tuple[Codec, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    unit: int = 1

    def tokens(self, own: slice) -> Self:
        """The hops of some tokens of a tensor."""
        return replace(self, codecs=tuple(codec.tokens(own) for codec in self.codecs))


class CodingWork(NamedTuple):
    """The work of one rank in a sum, for the cost model: latencies in a row, and values encoded and decoded."""

    num_latencies: int
    num_encoded: float
    num_decoded: float


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to all-reduce, and all that others need to know of it.

    `num_hops`: codecs that it needs, one for each kind of transfer (`Hops`).
    `recodes`: the sum is coded again and travels again.
    `needs_groups`: it must be told the ranks of each node.
    `steps(x_TE, y_TE, hops, rank, world_size, stats)` runs on a rank and fills `y_TE` with the sum, reading nothing
    of `x_TE` once it writes; `twin(partials, hops, stats)` is its specification in one process;
    `sent(hops, T, E, rank, world_size)` is what a rank sends, None where the algorithm cannot run;
    `work(num_values, world_size)` is what `perf.estimate` predicts its time from, None where that is unknown.
    `kernels_only`: between its exchanges, steps do nothing to tensors but by kernels of codecs, so that they can be
    recorded and run again (`one_call`).
    """

    num_hops: int
    recodes: bool
    needs_groups: bool = False
    steps: Callable[[Tensor, Tensor, Hops, int, int, Tensor | None], Filling]
    twin: Callable[[Sequence[Tensor], Hops, Tensor | None], Tensor]
    sent: Callable[[Hops, int, int, int, int], Sent | None]
    work: Callable[[int, int], CodingWork | None] = lambda num_values, world_size: None
    kernels_only: bool = False


def share_of(total: int, rank: int, world_size: int) -> slice:
    """The share of `rank` in `total` tokens or features: shares differ by one at most."""
    return slice(rank * total // world_size, (rank + 1) * total // world_size)


def to_all(payload: Tensor, payloads: Sequence[Tensor], rank: int, num_values: int) -> Exchange:
    """Send one payload of `num_values` values to every peer, receive theirs into `payloads`."""
    peers = range(len(payloads))
    sends = [None if peer == rank else payload for peer in peers]
    return Exchange(sends, without(payloads, rank), num_values * (len(peers) - 1))


def without(buffers: Sequence[Tensor], rank: int) -> list[Tensor | None]:
    """The buffers for the peers: None at the rank's own place."""
    return [None if peer == rank else buffer for peer, buffer in enumerate(buffers)]


def new_payload(codec: Codec, num_tokens: int, num_features: int, like: Tensor) -> Tensor:
    """Room for a payload [T, B] on the device of `like`."""
    return torch.empty(num_tokens, codec.row_nbytes(num_features), dtype=torch.uint8, device=like.device)


def check_matrix(x_TE: Tensor) -> None:
    """InvalidInputError unless `x_TE` is a matrix."""
    if x_TE.ndim != 2:
        raise InvalidInputError(
            "collective", expected="a tensor [tokens, features]", found=f"{list(x_TE.shape)}", remedy="Reshape it."
        )


def check_peer(name: str, peer: int, world_size: int, rank: int | None = None) -> None:
    """InvalidInputError unless `peer` is a rank of the group, and not `rank`."""
    if not 0 <= peer < world_size or peer == rank:
        raise InvalidInputError(
            name,
            expected=f"a rank from 0 to {world_size - 1}" + (f", other than {rank}" if rank is not None else ""),
            found=peer,
            remedy="Count ranks within the group.",
        )
