"""hierarchical: sum within each node, then between nodes, so that slow links carry a node's sum and not each rank's.

Of every node the first S ranks (S being the size of the smallest node) own 1/S of the sum each, as in two_shot.
1. Within a node, each rank sends every owner its share, coded with hop 0; the owner adds the ranks up.
2. Owners of the same share send each other their node's sum, coded with hop 2, and add the nodes up in order.
3. Each owner codes the total with hop 1 and sends it within its node; everyone decodes that, the owner too.

Three latencies, three roundings. Between nodes a rank sends (N - 1) / S payloads, N being the number of nodes.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.base import Algorithm, Exchange, Filling, Hops, Sent, Traffic, new_payload
from narrowcast.collectives.two_shot import Share, shares, twin_shares


class Seat(NamedTuple):
    """A rank's place: its node, the ranks of that node, and who owns what in it."""

    rank: int
    world_size: int
    node: int
    members: tuple[int, ...]
    owned: Mapping[int, Share]  # by rank of this node
    peers: tuple[int, ...]  # owners of the same share, one a node; none where the rank owns nothing

    def exchange(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], num_values: int) -> Exchange:
        """Payloads by rank, this one's own left out."""

        def by_peer(buffers: Mapping[int, Tensor]) -> list[Tensor | None]:
            return [None if peer == self.rank else buffers.get(peer) for peer in range(self.world_size)]

        return Exchange(by_peer(sends), by_peer(recvs), num_values)


def _seat(hops: Hops, num_tokens: int, num_features: int, rank: int, world_size: int) -> Seat | None:
    """None where the algorithm cannot run: no nodes, too few codecs, or too small a tensor to share."""
    if not hops.groups or len(hops.codecs) < 3:
        return None
    owned = shares(hops, num_tokens, num_features, min(len(group) for group in hops.groups))
    if owned is None:
        return None
    node = next(node for node, group in enumerate(hops.groups) if rank in group)
    members = hops.groups[node]
    place = members.index(rank)
    peers = tuple(group[place] for group in hops.groups) if place < len(owned) else ()
    return Seat(rank, world_size, node, members, dict(zip(members, owned, strict=False)), peers)


def _steps(x_TE: Tensor, y_TE: Tensor, hops: Hops, rank: int, world_size: int, stats: Tensor | None) -> Filling:
    seat = _seat(hops, len(x_TE), x_TE.shape[1], rank, world_size)
    assert seat is not None, "the choice of the algorithm asks `sent` first"
    sum_TE = yield from _sum_in_node(x_TE, seat, stats)
    total_TE = yield from _sum_of_nodes(sum_TE, seat, stats)
    yield from _gather_in_node(total_TE, seat, y_TE, stats)


def _sum_in_node(x_TE: Tensor, seat: Seat, stats: Tensor | None) -> Generator[Exchange, None, Tensor | None]:
    """The node's sum of this rank's share, if it owns one."""
    sends = {
        owner: share.partial.encode(share.of(x_TE), source=seat.rank, stats=stats)
        for owner, share in seat.owned.items()
    }
    own = seat.owned.get(seat.rank)
    num_values = sum(share.num_values for share in seat.owned.values()) - (own.num_values if own else 0)
    if own is None:
        yield seat.exchange(sends, {}, num_values)
        return None
    payload_TB = sends[seat.rank]
    payloads_MTB = payload_TB.expand(len(seat.members), *payload_TB.shape).contiguous()
    yield seat.exchange(sends, dict(zip(seat.members, payloads_MTB, strict=True)), num_values)
    return own.partial.sources(seat.members).decode_sum(payloads_MTB, num_features=own.shape[1])


def _sum_of_nodes(sum_TE: Tensor | None, seat: Seat, stats: Tensor | None) -> Generator[Exchange, None, Tensor | None]:
    """The total of this rank's share, if it owns one."""
    if sum_TE is None:
        yield seat.exchange({}, {}, 0)
        return None
    between = seat.owned[seat.rank].codecs[2]
    payload_TB = between.encode(sum_TE, source=seat.node, stats=stats)
    payloads_NTB = payload_TB.expand(len(seat.peers), *payload_TB.shape).contiguous()
    sends, recvs = dict.fromkeys(seat.peers, payload_TB), dict(zip(seat.peers, payloads_NTB, strict=True))
    yield seat.exchange(sends, recvs, (len(seat.peers) - 1) * sum_TE.numel())
    return between.decode_sum(payloads_NTB, num_features=sum_TE.shape[1])


def _gather_in_node(total_TE: Tensor | None, seat: Seat, y_TE: Tensor, stats: Tensor | None) -> Filling:
    """All shares of the total, into `y_TE`."""
    payloads = {owner: new_payload(share.reduced, *share.shape, like=y_TE) for owner, share in seat.owned.items()}
    sends, num_values = {}, 0
    if total_TE is not None:
        counted = stats if seat.node == 0 else None  # every node codes the same total: it counts once
        payload_TB = seat.owned[seat.rank].reduced.encode(total_TE, source=0, out=payloads[seat.rank], stats=counted)
        sends, num_values = dict.fromkeys(seat.members, payload_TB), (len(seat.members) - 1) * total_TE.numel()
    yield seat.exchange(sends, payloads, num_values)
    for owner, share in seat.owned.items():
        share.reduced.decode(payloads[owner], source=0, out=share.of(y_TE))


def _twin(partials: Sequence[Tensor], hops: Hops, stats: Tensor | None) -> Tensor:
    num_tokens, num_features = partials[0].shape
    y_TE = partials[0].new_empty(num_tokens, num_features)
    for share in twin_shares(hops, num_tokens, num_features, min(len(group) for group in hops.groups)):
        payloads_RTB, between = share.coded(partials, stats), share.codecs[2]
        sums = [
            share.partial.sources(group).decode_sum(payloads_RTB[list(group)], num_features=share.shape[1])
            for group in hops.groups
        ]
        payloads = [between.encode(sum_TE, source=node, stats=stats) for node, sum_TE in enumerate(sums)]
        total_TE = between.decode_sum(torch.stack(payloads), num_features=share.shape[1])
        payload_TB = share.reduced.encode(total_TE, source=0, stats=stats)
        share.reduced.decode(payload_TB, source=0, out=share.of(y_TE))
    return y_TE


def _sent(hops: Hops, num_tokens: int, num_features: int, rank: int, world_size: int) -> Sent | None:
    seat = _seat(hops, num_tokens, num_features, rank, world_size)
    if seat is None:
        return None
    partials = [_traffic(share.partial, share, 1) for owner, share in seat.owned.items() if owner != rank]
    partial, reduced, between = Sent(tuple(partials)).total, Traffic(0, 0), Traffic(0, 0)
    if rank in seat.owned:
        own = seat.owned[rank]
        reduced = _traffic(own.reduced, own, len(seat.members) - 1)
        between = _traffic(own.codecs[2], own, len(seat.peers) - 1)
    return Sent((partial, reduced, between))


def _traffic(codec: Codec, share: Share, peers: int) -> Traffic:
    return Traffic(peers * codec.payload_nbytes(*share.shape), peers * share.num_values)


HIERARCHICAL = Algorithm(num_hops=3, recodes=True, needs_groups=True, steps=_steps, twin=_twin, sent=_sent)
