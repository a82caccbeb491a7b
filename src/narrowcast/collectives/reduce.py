"""Sums of coded tensors over ranks: `all_reduce` and `reduce_scatter`."""

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.agreement import agree
from narrowcast.collectives.algorithms import checked_hops, choose, named
from narrowcast.collectives.base import (
    Begin,
    Deferred,
    Exchange,
    Filling,
    Hops,
    Steps,
    check_matrix,
    share_of,
    without,
)
from narrowcast.collectives.pending import Group, Pending, finish, transport_of
from narrowcast.errors import InvalidInputError
from narrowcast.transport import Transport, Work

MAX_CHUNKS = 64  # of one tensor: more would gain nothing, and each costs some 30 us of Python
WINDOW = 16  # chunks under way: enough bytes for a long link, few enough to be decoded while the caches have them


@overload
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    groups: Sequence[Sequence[int]] = (),
    out: Tensor | None = None,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    groups: Sequence[Sequence[int]] = (),
    out: Tensor | None = None,
    async_op: Literal[True],
) -> Pending: ...
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    groups: Sequence[Sequence[int]] = (),
    out: Tensor | None = None,
    async_op: bool = False,
) -> Tensor | Pending:
    """Sum `x` [..., E] over the ranks of `group`, sending each partial sum coded. Returns a tensor like `x`.

    `codec`: one for the partial sums, or several by hop: (partial, reduced) where two_shot sends the sum again,
    (partial, reduced, between) for hierarchical, where what travels between nodes has a codec with a source a node.
    `algorithm`: "one_shot", "two_shot", "hierarchical", or "auto", which takes hierarchical where it can run and
    otherwise the one that sends fewer bytes.
    `groups`: the ranks (of `group`) in each node, such as [[0, 1], [2, 3]]; every rank passes the same.
    `out`: where the sum goes, a contiguous tensor like `x`, perhaps `x` itself; a new one if not given.
    `async_op=True` returns at once; `.wait()` on the result gives the tensor.
    Raises InvalidInputError for a codec or groups that do not fit, PeerLostError when a rank is lost.
    """
    transport = transport_of(group)
    hops = checked_hops(codec, transport.world_size, groups)
    if x.ndim == 0:
        raise InvalidInputError(
            "all_reduce", expected="a tensor [..., features]", found="a scalar", remedy="Reshape it."
        )
    if out is not None and not (out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()):
        raise InvalidInputError(
            "out",
            expected=f"a contiguous tensor {list(x.shape)} in {x.dtype}",
            found=f"{list(out.shape)} in {out.dtype}",
            remedy="Pass torch.empty_like(x), or nothing.",
        )
    agree(hops.codecs, transport, x.device)
    name = choose(algorithm, hops, x.shape[:-1].numel(), x.shape[-1], transport.world_size)
    return finish(Pending(all_reduce_steps(x, hops, transport, name, out=out), transport), async_op)


def all_reduce_steps(
    x: Tensor,
    hops: Hops,
    transport: Transport,
    algorithm: str,
    stats: Tensor | None = None,
    out: Tensor | None = None,
) -> Steps:
    """The steps of `algorithm`, which can run, on `x` [..., E]."""
    x_TE, y = x.reshape(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    yield from deferred_all_reduce_steps(Deferred.of(x_TE), y.view(x_TE.shape), hops, transport, algorithm, stats)
    return y


def deferred_all_reduce_steps(
    x: Deferred,
    y_TE: Tensor,
    hops: Hops,
    transport: Transport,
    algorithm: str,
    stats: Tensor | None = None,
    *,
    in_chunks: bool = True,
) -> Steps:
    """The same of tokens that are yet to be computed: all at once, or chunks that take turns, computing and sending.

    `in_chunks=False`: all at once, whatever the transport gains by chunks, as the caller has something else to compute.
    """
    steps, rank, world_size = named(algorithm).steps, transport.rank, transport.world_size
    chunk_values = transport.chunk_values if in_chunks else None
    chunks = chunks_of(hops, x.num_tokens, x.num_features, world_size, chunk_values)
    if len(chunks) == 1:
        yield from steps(x.tokens(chunks[0]), y_TE, hops, rank, world_size, stats)
    else:
        yield from in_turns(
            steps(x.tokens(own), y_TE[own], hops.tokens(own), rank, world_size, stats) for own in chunks
        )
    return y_TE


def filled(y_TE: Tensor, steps: Filling) -> Steps:
    """The same steps, which return the tensor that they fill."""
    yield from steps
    return y_TE


def chunks_of(hops: Hops, num_tokens: int, num_features: int, world_size: int, chunk_values: int | None) -> list[slice]:
    """Tokens that travel together: as many as have `chunk_values` values (None: all).

    In units that all ranks share evenly, so that each owns and sends as much as without chunks.
    """
    unit = math.lcm(world_size, *map(len, hops.groups)) if hops.groups else world_size
    num_values = num_tokens * num_features
    if chunk_values is None or num_tokens < 2 * unit or num_values <= chunk_values:
        return [slice(0, num_tokens)]
    num_chunks = min(-(-num_values // chunk_values), MAX_CHUNKS, num_tokens // unit)
    starts = [share_of(num_tokens // unit, chunk, num_chunks).start * unit for chunk in range(num_chunks)]
    return [slice(start, stop) for start, stop in pairwise([*starts, num_tokens])]


def in_turns(parts: Iterable[Filling]) -> Generator[Begin | Work, Work, None]:
    """The steps of all parts, of which WINDOW are under way: while the bytes of one travel, the next one codes."""
    under_way: deque[tuple[Filling, Work]] = deque()
    for part in parts:
        under_way.append((part, (yield Begin(next(part)))))
        while len(under_way) == WINDOW:
            yield from _step_of_the_oldest(under_way)
    while under_way:
        yield from _step_of_the_oldest(under_way)


def _step_of_the_oldest(under_way: deque[tuple[Filling, Work]]) -> Generator[Begin | Work, Work, None]:
    part, work = under_way.popleft()
    yield work
    exchange = next(part, None)
    if exchange is not None:
        under_way.append((part, (yield Begin(exchange))))


@overload
def reduce_scatter(
    x_TE: Tensor, *, codec: Codec | Sequence[Codec], group: Group = None, async_op: Literal[False] = False
) -> Tensor: ...
@overload
def reduce_scatter(
    x_TE: Tensor, *, codec: Codec | Sequence[Codec], group: Group = None, async_op: Literal[True]
) -> Pending: ...
def reduce_scatter(
    x_TE: Tensor, *, codec: Codec | Sequence[Codec], group: Group = None, async_op: bool = False
) -> Tensor | Pending:
    """Sum `x_TE` over the ranks; each keeps the tokens [rank * T // R, (rank + 1) * T // R) of the sum."""
    transport = transport_of(group)
    hops = checked_hops(codec, transport.world_size)
    check_matrix(x_TE)
    agree(hops.codecs, transport, x_TE.device)
    steps = reduce_scatter_steps(x_TE, hops.codecs[0], transport.rank, transport.world_size)
    return finish(Pending(steps, transport), async_op)


def reduce_scatter_steps(x_TE: Tensor, codec: Codec, rank: int, world_size: int) -> Steps:
    """Steps of a reduce_scatter: each rank sends every other one the payload of its share."""
    num_tokens, num_features = x_TE.shape
    own = share_of(num_tokens, rank, world_size)
    payload_TB = codec.encode(x_TE, source=rank)
    sends = [payload_TB[share_of(num_tokens, peer, world_size)] for peer in range(world_size)]
    payloads_RTB = sends[rank].expand(world_size, *sends[rank].shape).contiguous()
    num_values = (num_tokens - (own.stop - own.start)) * num_features
    yield Exchange(without(sends, rank), without(payloads_RTB.unbind(), rank), num_values)
    return codec.decode_sum(payloads_RTB, dtype=x_TE.dtype, num_features=x_TE.shape[1])
