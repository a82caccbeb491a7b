"""`all_to_all`: every rank sends each other one tokens of its own, as experts' dispatch and combine do."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.agreement import agree
from narrowcast.collectives.algorithms import source_of
from narrowcast.collectives.base import Exchange, Steps, check_matrix, new_payload, without
from narrowcast.collectives.pending import Group, Pending, finish, transport_of
from narrowcast.errors import InvalidInputError


@overload
def all_to_all(
    x_TE: Tensor,
    *,
    codec: Codec,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: Group = None,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def all_to_all(
    x_TE: Tensor,
    *,
    codec: Codec,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: Group = None,
    async_op: Literal[True],
) -> Pending: ...
def all_to_all(
    x_TE: Tensor,
    *,
    codec: Codec,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: Group = None,
    async_op: bool = False,
) -> Tensor | Pending:
    """Send tokens of `x_TE` to each rank and return those that came from each, in rank order, in the dtype of `x_TE`.

    `send_counts[r]`: how many tokens of `x_TE` are for rank r, those for rank 0 first; `recv_counts[r]`: how many
    come from rank r. Zeros are fine. What stays on this rank is coded and decoded like the rest, so that a token's
    value does not depend on where it goes.
    `codec`: one with a source for each sending rank, with a single one, or without.
    Counts do not travel: where the ranks' counts contradict each other, the result is undefined (with gloo, tokens
    beyond those expected end the process). InvalidInputError for counts that do not fit this rank's own tensor.
    """
    transport = transport_of(group)
    check_matrix(x_TE)
    rank, world_size = transport.rank, transport.world_size
    check_counts(send_counts, recv_counts, len(x_TE), rank, world_size)
    source_of(codec, rank, world_size)
    agree([codec], transport, x_TE.device)
    return finish(Pending(all_to_all_steps(x_TE, codec, send_counts, recv_counts, rank), transport), async_op)


def all_to_all_steps(
    x_TE: Tensor,
    codec: Codec,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    rank: int,
    stats: Tensor | None = None,
) -> Steps:
    """Steps of an all_to_all."""
    world_size, num_features = len(send_counts), x_TE.shape[1]
    sends = codec.encode(x_TE, source=source_of(codec, rank, world_size), stats=stats).split(list(send_counts))
    recvs = new_payload(codec, sum(recv_counts), num_features, like=x_TE).split(list(recv_counts))
    recvs[rank].copy_(sends[rank])
    num_values = (len(x_TE) - send_counts[rank]) * num_features
    yield Exchange(without(sends, rank), without(recvs, rank), num_values)
    y_TE = torch.empty(sum(recv_counts), num_features, dtype=x_TE.dtype, device=x_TE.device)
    for peer, (payload_TB, part_TE) in enumerate(zip(recvs, y_TE.split(list(recv_counts)), strict=True)):
        codec.decode(payload_TB, source=source_of(codec, peer, world_size), out=part_TE)
    return y_TE


def check_counts(
    send_counts: Sequence[int], recv_counts: Sequence[int], num_tokens: int, rank: int, world_size: int
) -> None:
    """InvalidInputError unless `rank` can send and receive as many tokens."""
    for name, counts in (("send_counts", send_counts), ("recv_counts", recv_counts)):
        if len(counts) != world_size or any(count < 0 for count in counts):
            raise InvalidInputError(
                name,
                expected=f"one count for each of {world_size} ranks",
                found=list(counts),
                remedy="Pass 0 for a rank that has no part.",
            )
    if sum(send_counts) != num_tokens:
        raise InvalidInputError(
            "send_counts",
            expected=f"counts of {num_tokens} tokens in all",
            found=f"{list(send_counts)}, {sum(send_counts)} in all",
            remedy="Count each token of the tensor once.",
        )
    if send_counts[rank] != recv_counts[rank]:
        raise InvalidInputError(
            f"recv_counts[{rank}]",
            expected=f"{send_counts[rank]}, as rank {rank} keeps for itself",
            found=recv_counts[rank],
            remedy="recv_counts[r] is what rank r has as send_counts for this rank.",
        )
