"""Sums of coded tensors over ranks: `all_reduce` and `reduce_scatter`."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.algorithms import checked_stages, choose, named
from narrowcast.collectives.base import Exchange, Stages, Steps, check_matrix, share_of, without
from narrowcast.collectives.pending import Group, Pending, finish, transport_of
from narrowcast.errors import InvalidInputError
from narrowcast.transport import Transport


@overload
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    groups: Sequence[Sequence[int]] = (),
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
    async_op: Literal[True],
) -> Pending: ...
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    groups: Sequence[Sequence[int]] = (),
    async_op: bool = False,
) -> Tensor | Pending:
    """Sum `x` [..., E] over the ranks of `group`, sending each partial sum coded. Returns a new tensor like `x`.

    `codec`: one for the partial sums, or several by stage: (partial, reduced) where two_shot sends the sum again,
    (partial, reduced, between) for hierarchical, where what travels between nodes has a codec with a source a node.
    `algorithm`: "one_shot", "two_shot", "hierarchical", or "auto", which takes hierarchical where it can run and
    otherwise the one that sends fewer bytes.
    `groups`: the ranks (of `group`) in each node, such as [[0, 1], [2, 3]]; every rank passes the same.
    `async_op=True` returns at once; `.wait()` on the result gives the tensor.
    Raises InvalidInputError for a codec or groups that do not fit, PeerLostError when a rank is lost.
    """
    transport = transport_of(group)
    stages = checked_stages(codec, transport.world_size, groups)
    if x.ndim == 0:
        raise InvalidInputError(
            "all_reduce", expected="a tensor [..., features]", found="a scalar", remedy="Reshape it."
        )
    return finish(Pending(all_reduce_steps(x, stages, transport, algorithm), transport), async_op)


def all_reduce_steps(
    x: Tensor, stages: Stages, transport: Transport, algorithm: str, stats: Tensor | None = None
) -> Steps:
    """The steps of `algorithm` on `x` [..., E]."""
    x_TE = x.reshape(-1, x.shape[-1])
    name = choose(algorithm, stages, len(x_TE), x.shape[-1], transport.world_size)
    y_TE = yield from named(name).steps(x_TE, stages, transport.rank, transport.world_size, stats)
    return y_TE.view(x.shape)


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
    stages = checked_stages(codec, transport.world_size)
    check_matrix(x_TE)
    steps = reduce_scatter_steps(x_TE, stages.codecs[0], transport.rank, transport.world_size)
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
