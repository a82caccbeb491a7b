"""Tensors that every rank ends up with alike: `all_gather` of all ranks' tokens, `broadcast` of one rank's.

The sender decodes its own payload too, so that no rank holds other bits than the rest.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, overload

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.agreement import agree
from narrowcast.collectives.algorithms import source_of
from narrowcast.collectives.base import Exchange, Steps, check_matrix, check_peer, new_payload, to_all
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
    agree([codec], transport, x_TE.device)
    return finish(Pending(all_gather_steps(x_TE, codec, counts, transport.rank), transport), async_op)


def all_gather_steps(
    x_TE: Tensor, codec: Codec, num_tokens: Sequence[int], rank: int, stats: Tensor | None = None
) -> Steps:
    """Steps of an all_gather where rank r holds `num_tokens[r]` tokens."""
    world_size, num_features = len(num_tokens), x_TE.shape[1]
    payloads = [new_payload(codec, count, num_features, like=x_TE) for count in num_tokens]
    codec.encode(x_TE, source=source_of(codec, rank, world_size), out=payloads[rank], stats=stats)
    yield to_all(payloads[rank], payloads, rank, x_TE.numel())
    y_TE = torch.empty(sum(num_tokens), num_features, dtype=x_TE.dtype, device=x_TE.device)
    for peer, (payload_TB, part_TE) in enumerate(zip(payloads, y_TE.split(list(num_tokens)), strict=True)):
        codec.decode(payload_TB, source=source_of(codec, peer, world_size), out=part_TE)
    return y_TE


def all_gather_features_steps(
    x_TE: Tensor, codec: Codec, num_features: Sequence[int], rank: int, stats: Tensor | None = None
) -> Steps:
    """Steps of an all_gather [T, E0 + E1 + ...] of columns, of which rank r holds `num_features[r]`."""
    num_tokens, blocks = len(x_TE), blocks_of(num_features)
    codecs = [codec.part(block.start, block.stop) for block in blocks]
    payloads = [new_payload(own, num_tokens, num, like=x_TE) for own, num in zip(codecs, num_features, strict=True)]
    codecs[rank].encode(x_TE, source=source_of(codec, rank, len(blocks)), out=payloads[rank], stats=stats)
    yield to_all(payloads[rank], payloads, rank, x_TE.numel())
    y_TE = torch.empty(num_tokens, sum(num_features), dtype=x_TE.dtype, device=x_TE.device)
    for peer, (payload_TB, block) in enumerate(zip(payloads, blocks, strict=True)):
        codecs[peer].decode(payload_TB, source=source_of(codec, peer, len(blocks)), out=y_TE[:, block])
    return y_TE


def blocks_of(num_features: Sequence[int]) -> list[slice]:
    """The columns of the whole that each rank holds."""
    stops = list(accumulate(num_features))
    return [slice(stop - num, stop) for num, stop in zip(num_features, stops, strict=True)]


@overload
def broadcast(
    x_TE: Tensor | None,
    *,
    src: int,
    codec: Codec,
    num_tokens: int,
    num_features: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    group: Group = None,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def broadcast(
    x_TE: Tensor | None,
    *,
    src: int,
    codec: Codec,
    num_tokens: int,
    num_features: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    group: Group = None,
    async_op: Literal[True],
) -> Pending: ...
def broadcast(
    x_TE: Tensor | None,
    *,
    src: int,
    codec: Codec,
    num_tokens: int,
    num_features: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    group: Group = None,
    async_op: bool = False,
) -> Tensor | Pending:
    """The tensor [num_tokens, num_features] of rank `src` of `group`, decoded to `dtype` on every rank.

    `x_TE` counts at `src` alone; other ranks may pass None. Sizes do not travel: every rank passes the same ones.
    `codec`: one with a source for each rank of the group, with a single one, or without.
    """
    transport = transport_of(group)
    rank, world_size = transport.rank, transport.world_size
    check_peer("src", src, world_size)
    source_of(codec, src, world_size)
    if rank == src and (x_TE is None or x_TE.shape != (num_tokens, num_features)):
        raise InvalidInputError(
            "broadcast",
            expected=f"a tensor [{num_tokens}, {num_features}] at rank {src}",
            found="none" if x_TE is None else f"{list(x_TE.shape)}",
            remedy="Pass it on the rank that it comes from, and its shape on every rank.",
        )
    y_TE = torch.empty(num_tokens, num_features, dtype=dtype, device=device)
    agree([codec], transport, y_TE.device)
    steps = broadcast_steps(x_TE if rank == src else None, y_TE, codec, src, rank, world_size)
    return finish(Pending(steps, transport), async_op)


def broadcast_steps(
    x_TE: Tensor | None,
    y_TE: Tensor,
    codec: Codec,
    src: int,
    rank: int,
    world_size: int,
    stats: Tensor | None = None,
) -> Steps:
    """Steps of filling `y_TE` on every rank with what `src` has in `x_TE`."""
    source = source_of(codec, src, world_size)
    payload_TB = new_payload(codec, len(y_TE), y_TE.shape[1], like=y_TE)
    nobody: list[Tensor | None] = [None] * world_size
    if x_TE is None:
        yield Exchange(nobody, [payload_TB if peer == src else None for peer in range(world_size)], 0)
    else:
        codec.encode(x_TE, source=source, out=payload_TB, stats=stats)
        num_values = (world_size - 1) * x_TE.numel()
        yield Exchange([None if peer == rank else payload_TB for peer in range(world_size)], nobody, num_values)
    return codec.decode(payload_TB, source=source, out=y_TE)
