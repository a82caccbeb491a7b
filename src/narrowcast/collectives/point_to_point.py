"""`send` and `recv`: a coded tensor from one rank to another, such as what one pipeline stage hands to the next."""

from typing import Literal, overload

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.agreement import announced
from narrowcast.collectives.algorithms import source_of
from narrowcast.collectives.base import Exchange, Steps, check_matrix, check_peer, new_payload
from narrowcast.collectives.pending import Group, Pending, finish, transport_of


@overload
def send(x_TE: Tensor, *, dst: int, codec: Codec, group: Group = None, async_op: Literal[False] = False) -> Tensor: ...
@overload
def send(x_TE: Tensor, *, dst: int, codec: Codec, group: Group = None, async_op: Literal[True]) -> Pending: ...
def send(x_TE: Tensor, *, dst: int, codec: Codec, group: Group = None, async_op: bool = False) -> Tensor | Pending:
    """Send `x_TE`, coded, to rank `dst` of `group`, which calls `recv`. Returns `x_TE` itself when it has arrived.

    Sends from one rank to another are received in the order in which they were started. Two ranks that send to each
    other first and receive afterwards wait for each other: pass `async_op=True`, and wait for the result, which
    holds the payload until then.
    `codec`: one with a source for each rank of the group, with a single one, or without.
    Raises InvalidInputError for a codec or a rank that does not fit, PeerLostError when a rank is lost.
    """
    transport = transport_of(group)
    check_matrix(x_TE)
    rank, world_size = transport.rank, transport.world_size
    check_peer("dst", dst, world_size, rank)
    source_of(codec, rank, world_size)
    pair = rank, dst
    steps = announced(send_steps(x_TE, codec, dst, rank, world_size), codec, transport, x_TE.device, pair)
    return finish(Pending(steps, transport, pair=pair), async_op)


def send_steps(x_TE: Tensor, codec: Codec, dst: int, rank: int, world_size: int, stats: Tensor | None = None) -> Steps:
    """Steps of a send from `rank` to `dst`."""
    payload_TB = codec.encode(x_TE, source=source_of(codec, rank, world_size), stats=stats)
    sends = [payload_TB if peer == dst else None for peer in range(world_size)]
    yield Exchange(sends, [None] * world_size, x_TE.numel())
    return x_TE


@overload
def recv(
    num_tokens: int,
    num_features: int,
    *,
    src: int,
    codec: Codec,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    group: Group = None,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def recv(
    num_tokens: int,
    num_features: int,
    *,
    src: int,
    codec: Codec,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    group: Group = None,
    async_op: Literal[True],
) -> Pending: ...
def recv(
    num_tokens: int,
    num_features: int,
    *,
    src: int,
    codec: Codec,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    group: Group = None,
    async_op: bool = False,
) -> Tensor | Pending:
    """The tensor [num_tokens, num_features] that rank `src` of `group` sends, decoded to `dtype` on `device`.

    Both ends know the size, the codec and its tensors: none of it travels, but that before the first payload of a codec
    its digest does. Sizes that contradict each other are not noticed by gloo (a larger payload than expected ends the
    process).
    Raises InvalidInputError for a codec or a rank that does not fit, or another codec than the sender's; PeerLostError
    when a rank is lost.
    """
    transport = transport_of(group)
    rank, world_size = transport.rank, transport.world_size
    check_peer("src", src, world_size, rank)
    source_of(codec, src, world_size)
    y_TE = torch.empty(num_tokens, num_features, dtype=dtype, device=device)
    pair = src, rank
    steps = announced(recv_steps(y_TE, codec, src, world_size), codec, transport, y_TE.device, pair)
    return finish(Pending(steps, transport, pair=pair), async_op)


def recv_steps(y_TE: Tensor, codec: Codec, src: int, world_size: int) -> Steps:
    """Steps of filling `y_TE` with what `src` sends."""
    payload_TB = new_payload(codec, len(y_TE), y_TE.shape[1], like=y_TE)
    recvs = [payload_TB if peer == src else None for peer in range(world_size)]
    yield Exchange([None] * world_size, recvs, 0)
    return codec.decode(payload_TB, source=source_of(codec, src, world_size), out=y_TE)
