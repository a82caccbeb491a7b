"""What every rank ends up with alike: `all_gather` of all ranks' tokens, `broadcast` of one rank's.

The sender decodes its own payload too, so that no rank holds other bits than the rest.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.algorithms import source_of
from narrowcast.collectives.base import Steps, check_matrix, new_payload, to_all
from narrowcast.collectives.pending import Group, Pending, finish, transport_of
from narrowcast.errors import InvalidInputError


@overload
def all_gather(
    x_TE: Tensor,
    *,
    codec: Codec,
    group: Group = None,
    num_tokens: Sequence[int] | None = None,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def all_gather(
    x_TE: Tensor,
    *,
    codec: Codec,
    group: Group = None,
    num_tokens: Sequence[int] | None = None,
    async_op: Literal[True],
) -> Pending: ...
def all_gather(
    x_TE: Tensor,
    *,
    codec: Codec,
    group: Group = None,
    num_tokens: Sequence[int] | None = None,
    async_op: bool = False,
) -> Tensor | Pending:
    """All ranks' tokens [T0 + T1 + ..., E] in rank order, each decoded from its payload, this rank's own included.

    `num_tokens`: the tokens of each rank where they differ; every rank passes the same list.
    """
    transport = transport_of(group)
    check_matrix(x_TE)
    counts = [len(x_TE)] * transport.world_size if num_tokens is None else list(num_tokens)
    if len(counts) != transport.world_size or counts[transport.rank] != len(x_TE):
        raise InvalidInputError(
            "num_tokens",
            expected=f"one count for each of {transport.world_size} ranks, {len(x_TE)} at rank {transport.rank}",
            found=counts,
            remedy="Pass the same list on every rank.",
        )
    source_of(codec, transport.rank, transport.world_size)
    return finish(Pending(all_gather_steps(x_TE, codec, counts, transport.rank), transport), async_op)


def all_gather_steps(x_TE: Tensor, codec: Codec, num_tokens: Sequence[int], rank: int) -> Steps:
    """Steps of an all_gather where rank r holds `num_tokens[r]` tokens."""
    world_size, num_features = len(num_tokens), x_TE.shape[1]
    payloads = [new_payload(codec, count, num_features, like=x_TE) for count in num_tokens]
    codec.encode(x_TE, source=source_of(codec, rank, world_size), out=payloads[rank])
    yield to_all(payloads[rank], payloads, rank, x_TE.numel())
    y_TE = torch.empty(sum(num_tokens), num_features, dtype=x_TE.dtype, device=x_TE.device)
    for peer, (payload_TB, part_TE) in enumerate(zip(payloads, y_TE.split(list(num_tokens)), strict=True)):
        codec.decode(payload_TB, source=source_of(codec, peer, world_size), out=part_TE)
    return y_TE
