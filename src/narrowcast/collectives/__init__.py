"""Collectives on coded tensors: functional, SUM only, the same bits on every rank.

Each is driven from its algorithm's steps: start the exchange that a step yields, wait, take the next step.
"""

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives import simulate
from narrowcast.collectives.algorithms import ALGORITHMS, check_algorithm, checked_stages, choose, source_of
from narrowcast.collectives.base import Exchange, Steps, Traffic, new_payload, share_of, to_all, without
from narrowcast.errors import InvalidInputError
from narrowcast.transport import TorchDistributedTransport, Transport, Work

MAX_STEPS = 8  # exchanges of one collective, each of which has a tag of its own

Group = dist.ProcessGroup | Transport | None


class Pending:
    """A collective under way. `wait()` takes it to its end and returns the tensor; calling it again is free.

    A wait first ends the collectives that were started before: ranks may wait in different orders, but none may
    hold back a step that another one needs.
    """

    def __init__(self, steps: Steps, transport: Transport, sent: Callable[[Traffic], None] | None = None) -> None:
        self._steps, self._transport, self._sent = steps, transport, sent
        self._number = next(transport.collectives.numbers)
        self._num_steps = 0
        self._work: Work | None = None
        self._result: Tensor | None = None
        transport.collectives.under_way[self._number] = self
        self._step()

    def _step(self) -> None:
        try:
            exchange = next(self._steps)
            if self._sent is not None:
                self._sent(Traffic(_nbytes(exchange), exchange.num_values))
            tag = self._number * MAX_STEPS + self._num_steps
            self._work = self._transport.exchange(exchange.sends, exchange.recvs, tag=tag)
            self._num_steps += 1
        except StopIteration as end:
            self._work, self._result = None, end.value
            self._transport.collectives.under_way.pop(self._number, None)
        except BaseException:
            self._transport.collectives.under_way.pop(self._number, None)
            raise

    def wait(self) -> Tensor:
        """The result; PeerLostError if a rank is lost."""
        under_way = self._transport.collectives.under_way
        for other in [other for number, other in under_way.items() if number < self._number]:
            other.wait()
        try:
            while self._work is not None:
                self._work.wait()
                self._step()
        finally:
            under_way.pop(self._number, None)
        assert self._result is not None
        return self._result


@overload
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    async_op: Literal[True],
) -> Pending: ...
def all_reduce(
    x: Tensor,
    *,
    codec: Codec | Sequence[Codec],
    group: Group = None,
    algorithm: str = "auto",
    async_op: bool = False,
) -> Tensor | Pending:
    """Sum `x` [..., E] over the ranks of `group`, sending each partial sum coded. Returns a new tensor like `x`.

    `codec`: one for the partial sums, or the pair (partial, reduced) where two_shot sends the sum again.
    `algorithm`: "one_shot", "two_shot", or "auto", which takes the one that sends fewer bytes.
    `async_op=True` returns at once; `.wait()` on the result gives the tensor.
    Raises InvalidInputError for a codec that does not fit, PeerLostError when a rank is lost.
    """
    transport = transport_of(group)
    stages = checked_stages(codec, transport.world_size)
    if x.ndim == 0:
        raise InvalidInputError(
            "all_reduce", expected="a tensor [..., features]", found="a scalar", remedy="Reshape it."
        )
    return _finish(Pending(all_reduce_steps(x, stages, transport, algorithm), transport), async_op)


def all_reduce_steps(
    x: Tensor, stages: Sequence[Codec], transport: Transport, algorithm: str, stats: Tensor | None = None
) -> Steps:
    """The steps of `algorithm` on `x` [..., E]."""
    x_TE = x.reshape(-1, x.shape[-1])
    name = choose(algorithm, stages, len(x_TE), x.shape[-1], transport.world_size)
    y_TE = yield from ALGORITHMS[name].steps(x_TE, stages, transport.rank, transport.world_size, stats)
    return y_TE.view(x.shape)


def reduce_scatter(
    x_TE: Tensor, *, codec: Codec | Sequence[Codec], group: Group = None, async_op: bool = False
) -> Tensor | Pending:
    """Sum `x_TE` over the ranks; each keeps the tokens [rank * T // R, (rank + 1) * T // R) of the sum."""
    transport = transport_of(group)
    stage, *_ = checked_stages(codec, transport.world_size)
    _check_matrix(x_TE)
    return _finish(
        Pending(_reduce_scatter_steps(x_TE, stage, transport.rank, transport.world_size), transport), async_op
    )


def _reduce_scatter_steps(x_TE: Tensor, codec: Codec, rank: int, world_size: int) -> Steps:
    num_tokens, num_features = x_TE.shape
    own = share_of(num_tokens, rank, world_size)
    payload_TB = codec.encode(x_TE, source=rank)
    sends = [payload_TB[share_of(num_tokens, peer, world_size)] for peer in range(world_size)]
    payloads_RTB = sends[rank].expand(world_size, *sends[rank].shape).contiguous()
    num_values = (num_tokens - (own.stop - own.start)) * num_features
    yield Exchange(without(sends, rank), without(payloads_RTB.unbind(), rank), num_values)
    return codec.decode_sum(payloads_RTB, dtype=x_TE.dtype, num_features=num_features)


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
    _check_matrix(x_TE)
    counts = [len(x_TE)] * transport.world_size if num_tokens is None else list(num_tokens)
    if len(counts) != transport.world_size or counts[transport.rank] != len(x_TE):
        raise InvalidInputError(
            "num_tokens",
            expected=f"one count for each of {transport.world_size} ranks, {len(x_TE)} at rank {transport.rank}",
            found=counts,
            remedy="Pass the same list on every rank.",
        )
    source_of(codec, transport.rank, transport.world_size)
    return _finish(Pending(all_gather_steps(x_TE, codec, counts, transport.rank), transport), async_op)


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


def _check_matrix(x_TE: Tensor) -> None:
    if x_TE.ndim != 2:
        raise InvalidInputError(
            "collective", expected="a tensor [tokens, features]", found=f"{list(x_TE.shape)}", remedy="Reshape it."
        )


def transport_of(group: Group) -> Transport:
    """`group` as a transport."""
    return group if isinstance(group, Transport) else TorchDistributedTransport(group)


def _finish(pending: Pending, async_op: bool) -> Tensor | Pending:
    return pending if async_op else pending.wait()


def _nbytes(exchange: Exchange) -> int:
    return sum(buffer.nbytes for buffer in exchange.sends if buffer is not None)


__all__ = [
    "ALGORITHMS",
    "Pending",
    "all_gather",
    "all_gather_steps",
    "all_reduce",
    "all_reduce_steps",
    "check_algorithm",
    "checked_stages",
    "choose",
    "reduce_scatter",
    "simulate",
    "transport_of",
]
