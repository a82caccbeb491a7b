"""The communicator: a plan at work on one rank of a split model."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives import (
    Hops,
    Pending,
    all_gather_features_steps,
    all_gather_steps,
    all_to_all_steps,
    broadcast_steps,
    deferred_all_reduce_steps,
    recv_steps,
    send_steps,
)
from narrowcast.collectives.base import Deferred, Sent
from narrowcast.collectives.one_call import OneCall
from narrowcast.runtime.counters import SiteCounters
from narrowcast.runtime.planned import PlannedWires, payload
from narrowcast.runtime.sites import Sites
from narrowcast.runtime.small_sums import SmallSums
from narrowcast.runtime.turns import Turns
from narrowcast.transport import Transport

T = TypeVar("T")


class Communicator(PlannedWires):
    """Wires of one rank: `tp` joins the ranks that share its layers, `pp` the stages of its pipeline."""

    def __init__(self, sites: Sites, *, tp: Transport | None, pp: Transport | None, count_only: bool = False) -> None:
        rank, tp_size = (0, 1) if tp is None else (tp.rank, tp.world_size)
        super().__init__(sites, rank, tp_size, count_only=count_only)
        self._tp, self.pp = tp, pp
        self._small_sums = SmallSums(tp, self.feedback)
        self._turns, self.takes_turns = Turns(self.feedback.enter), pp is None

    @property
    def tp(self) -> Transport:
        """The tensor-parallel ranks."""
        assert self._tp is not None, "only a model with shared layers asks"
        return self._tp

    def may_schedule(self, x: Tensor) -> bool:
        """True where sums as large as `x` are made in one call, so that layers with them may run as recorded."""
        return self._small_sums.take(x) and not self._turns.taken and not self.sites.timed

    def forget(self, calls: Collection[OneCall]) -> None:
        """Do not run these sums again, one of which has failed."""
        self._small_sums.forget(calls)

    def run_parts(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """The results of parts of a forward, which take turns: while the sums of one travel, another computes.

        In a pipeline one runs after another: while one is in the next stage, another is in this one.
        """
        in_turns = self.takes_turns and not self._turns.taken
        return self._turns.take(parts) if in_turns else super().run_parts(parts)

    def _add_up(
        self,
        partials: Sequence[Deferred],
        y_TE: Tensor,
        hops: Hops,
        residue: Tensor | None,
        algorithm: str,
        counters: SiteCounters,
    ) -> str:
        (partial,) = partials
        if self._small_sums.take(y_TE) and not self._turns.taken and counters.clock is None:
            x_TE, stats = partial.tokens(slice(None)), counters.stats
            call = self._small_sums.add_up(x_TE, y_TE, hops, residue, algorithm, stats)
            if self.recorder is not None:
                self.recorder.add_up(call, x_TE, y_TE, residue, stats)
            return "steps" if call is None else "call"
        tp, turns = counters.transport(self.tp), self._turns
        fed_back = counters.hops(self._fed_back(hops, residue))
        in_chunks = not turns.taken and self.sites.decisions.chunks_pay(y_TE.shape[1], tp.chunk_values or 0)
        steps = deferred_all_reduce_steps(partial, y_TE, fed_back, tp, algorithm, counters.stats, in_chunks=in_chunks)
        pending = Pending(steps, tp)
        turns.begin_sum()
        pending.wait(turns.pass_on if turns.taken else None)
        turns.catch_up()
        return "steps"

    def _exact_sum(self, given_RNE: Tensor) -> Tensor:
        return self.tp.native_all_reduce(given_RNE[0])

    def _add_up_natively(self, partials: Sequence[Deferred]) -> Tensor:
        (partial,) = partials
        self._turns.begin_sum()
        y_TE = self.tp.native_all_reduce(partial.tokens(slice(None)))
        self._turns.catch_up()
        return y_TE

    def _gather_features(
        self, parts: Sequence[Tensor], codec: Codec, num_features: Sequence[int], counters: SiteCounters
    ) -> Tensor:
        (x_TE,), tp = parts, counters.transport(self.tp)
        steps = all_gather_features_steps(x_TE, counters.codec(codec), num_features, tp.rank, counters.stats)
        return Pending(steps, tp).wait()

    def _gather_tokens(
        self, parts: Sequence[Tensor], codec: Codec, num_tokens: Sequence[int], counters: SiteCounters
    ) -> Tensor:
        (x_TE,), tp = parts, counters.transport(self.tp)
        return Pending(all_gather_steps(x_TE, counters.codec(codec), num_tokens, tp.rank, counters.stats), tp).wait()

    def _all_to_all(
        self, parts: Sequence[Tensor], codec: Codec, counts: Sequence[Sequence[int]], counters: SiteCounters
    ) -> list[Tensor]:
        (x_TE,), tp = parts, counters.transport(self.tp)
        sent, received = counts[tp.rank], [row[tp.rank] for row in counts]
        steps = all_to_all_steps(x_TE, counters.codec(codec), sent, received, tp.rank, counters.stats)
        return [Pending(steps, tp).wait()]

    def send(self, x: Tensor, site: str, *, dst: int) -> None:
        """Send `x` [..., E] to pipeline stage `dst`."""
        assert self.pp is not None, "only a pipeline sends from stage to stage"
        x_TE, planned = x.reshape(-1, x.shape[-1]), self.sites.hops(site, x.dtype).codecs[0]
        counters = self.count_once(site, "boundary", x, len(x_TE), payload(planned, x_TE.shape))
        pp = counters.transport(self.pp)
        codec = counters.codec(self._used(planned, x))
        steps = send_steps(x_TE, codec, dst, pp.rank, pp.world_size, self._stats_of_stage(counters))
        Pending(steps, pp, pair=(pp.rank, dst)).wait()

    def recv(self, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The hidden states that pipeline stage `src` sends: [..., E] of that shape."""
        assert self.pp is not None, "only a pipeline sends from stage to stage"
        y_TE = _room(shape, dtype, device)
        counters = self.count_once(site, "boundary", y_TE, len(y_TE), Sent.once(0, 0))
        codec = counters.codec(self._used(self.sites.hops(site, dtype).codecs[0], y_TE))
        pp = counters.transport(self.pp)
        Pending(recv_steps(y_TE, codec, src, pp.world_size), pp, pair=(src, pp.rank)).wait()
        return y_TE.view(*shape)

    def broadcast(
        self, x: Tensor | None, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The tensor that pipeline stage `src` holds, `x` [..., E] of that shape there, at every stage."""
        assert self.pp is not None, "only a pipeline sends from stage to stage"
        y_TE, planned = _room(shape, dtype, device), self.sites.hops(site, dtype).codecs[0]
        copies = self.pp.world_size - 1 if self.pp.rank == src else 0
        counters = self.count_once(site, "boundary", y_TE, len(y_TE), payload(planned, y_TE.shape, copies))
        pp = counters.transport(self.pp)
        codec, x_TE = counters.codec(self._used(planned, y_TE)), None if x is None else x.reshape(y_TE.shape)
        steps = broadcast_steps(x_TE, y_TE, codec, src, pp.rank, pp.world_size, self._stats_of_stage(counters))
        Pending(steps, pp).wait()
        return y_TE.view(*shape)

    def _stats_of_stage(self, counters: SiteCounters) -> Tensor | None:
        """The ranks of a stage all send the same hidden states: what is clipped in them counts once."""
        return counters.stats if self.ranks[0] == 0 else None


def _room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(math.prod(shape[:-1]), shape[-1], dtype=dtype, device=device)
