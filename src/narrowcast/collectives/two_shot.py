"""two_shot: each rank adds up its share for all, codes the sum again, and everyone gathers the shares.

Two latencies, two roundings; 2 (R - 1) / R payloads sent by each rank. The shares are tokens; with fewer tokens
than ranks they are blocks of features, cut where both codecs may be cut. The owner of a share decodes its coded
sum like everyone else, so that all ranks end with the same bits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.base import (
    Algorithm,
    CodingWork,
    Exchange,
    Filling,
    Hops,
    Sent,
    Traffic,
    new_payload,
    share_of,
    to_all,
    without,
)


class Share(NamedTuple):
    """A rank's share of the sum: its tokens and features, with the codecs by hop of just these features."""

    tokens: slice
    features: slice
    codecs: tuple[Codec, ...]

    @property
    def partial(self) -> Codec:
        return self.codecs[0]

    @property
    def reduced(self) -> Codec:
        return self.codecs[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.stop - self.tokens.start, self.features.stop - self.features.start

    @property
    def num_values(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, x_TE: Tensor) -> Tensor:
        """The share's part of a tensor, as a view."""
        return x_TE[self.tokens, self.features]

    def coded(self, partials: Sequence[Tensor], stats: Tensor | None) -> Tensor:
        """The payloads [R, T, B] of the ranks' partial sums of this share."""
        payloads = [self.partial.encode(self.of(x), source=rank, stats=stats) for rank, x in enumerate(partials)]
        return torch.stack(payloads)


def shares(hops: Hops, num_tokens: int, num_features: int, world_size: int) -> list[Share] | None:
    """The share of each rank; None where there is no token and no block of features for every rank, or no hop 1."""
    if len(hops.codecs) < 2:
        return None
    if num_tokens >= world_size:
        tokens = [share_of(num_tokens, rank, world_size) for rank in range(world_size)]
        return [Share(own, slice(0, num_features), hops.tokens(own).codecs) for own in tokens]
    blocks = _blocks([hops.unit, *(codec.granularity for codec in hops.codecs)], num_features, world_size)
    if blocks is None:
        return None
    return [
        Share(slice(0, num_tokens), own, tuple(codec.features(own.start, own.stop) for codec in hops.codecs))
        for own in blocks
    ]


def twin_shares(hops: Hops, num_tokens: int, num_features: int, num_owners: int) -> list[Share]:
    """As `shares`, with tokens in one piece where each one's bytes depend on it alone, blocks' on where they end."""
    if num_tokens >= num_owners and all(codec.by_token for codec in hops.codecs):
        return [Share(slice(0, num_tokens), slice(0, num_features), hops.codecs)]
    owners = shares(hops, num_tokens, num_features, num_owners)
    assert owners is not None, "the choice of the algorithm asks `sent` first"
    return owners


def _blocks(granularities: Sequence[int | None], num_features: int, world_size: int) -> list[slice] | None:
    """The features of each rank in whole units of all granularities, the last one cut short; None for too few."""
    units = [granularity for granularity in granularities if granularity is not None]
    if len(units) < len(granularities):
        return None
    unit = math.lcm(*units)
    num_units = -(-num_features // unit)
    if num_units < world_size:
        return None
    owned = [share_of(num_units, rank, world_size) for rank in range(world_size)]
    return [slice(own.start * unit, min(own.stop * unit, num_features)) for own in owned]


def _steps(x_TE: Tensor, y_TE: Tensor, hops: Hops, rank: int, world_size: int, stats: Tensor | None) -> Filling:
    num_tokens, num_features = x_TE.shape
    owners = shares(hops, num_tokens, num_features, world_size)
    assert owners is not None, "the choice of the algorithm asks `sent` first"
    own = owners[rank]
    shape = world_size, own.shape[0], own.partial.row_nbytes(own.shape[1])
    partials_RTB = torch.empty(shape, dtype=torch.uint8, device=x_TE.device)
    sends = [
        owner.partial.encode(owner.of(x_TE), source=rank, out=partials_RTB[rank] if owner is own else None, stats=stats)
        for owner in owners
    ]
    yield Exchange(without(sends, rank), without(partials_RTB.unbind(), rank), x_TE.numel() - own.num_values)

    reduced = [new_payload(owner.reduced, *owner.shape, like=x_TE) for owner in owners]
    own.partial.recode(partials_RTB, own.reduced, num_features=own.shape[1], out=reduced[rank], stats=stats)
    yield to_all(reduced[rank], reduced, rank, own.num_values)
    for owner, payload_TB in zip(owners, reduced, strict=True):
        owner.reduced.decode(payload_TB, source=0, out=owner.of(y_TE))


def _twin(partials: Sequence[Tensor], hops: Hops, stats: Tensor | None) -> Tensor:
    num_tokens, num_features = partials[0].shape
    y_TE = partials[0].new_empty(num_tokens, num_features)
    for share in twin_shares(hops, num_tokens, num_features, len(partials)):
        payloads_RTB = share.coded(partials, stats)
        total_TE = share.partial.decode_sum(payloads_RTB, num_features=share.shape[1])
        payload_TB = share.reduced.encode(total_TE, source=0, stats=stats)
        share.reduced.decode(payload_TB, source=0, out=share.of(y_TE))
    return y_TE


def _sent(hops: Hops, num_tokens: int, num_features: int, rank: int, world_size: int) -> Sent | None:
    owners = shares(hops, num_tokens, num_features, world_size)
    if owners is None:
        return None
    own, peers = owners[rank], [owner for peer, owner in enumerate(owners) if peer != rank]
    nbytes = sum(owner.partial.payload_nbytes(*owner.shape) for owner in peers)
    partial = Traffic(nbytes, sum(owner.num_values for owner in peers))
    reduced = Traffic(len(peers) * own.reduced.payload_nbytes(*own.shape), len(peers) * own.num_values)
    return Sent((partial, reduced))


def _work(num_values: int, world_size: int) -> CodingWork:
    return CodingWork(2, num_values + num_values / world_size, 2 * num_values)


TWO_SHOT = Algorithm(num_hops=2, recodes=True, steps=_steps, twin=_twin, sent=_sent, work=_work, kernels_only=True)
