"""The simulator: a plan at work on all ranks of a whole model in one process, with the bits and bytes of real ranks."""

from collections.abc import Sequence

from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives import Hops, choose, named, simulate
from narrowcast.collectives.base import Deferred
from narrowcast.runtime.counters import SiteCounters
from narrowcast.runtime.planned import PlannedWires, payload
from narrowcast.runtime.sites import Sites, plain
from narrowcast.runtime.wires import VirtualWires


class Simulator(PlannedWires, VirtualWires):
    """Wires of all ranks, virtually. Bytes are those of rank 0 (of a stage), clipping is counted for all."""

    def __init__(self, sites: Sites, tp_size: int, *, count_only: bool = False) -> None:
        PlannedWires.__init__(self, sites, None, tp_size, count_only=count_only)

    def _add_up(
        self,
        partials: Sequence[Deferred],
        y_TE: Tensor,
        hops: Hops,
        residue: Tensor | None,
        algorithm: str,
        counters: SiteCounters,
    ) -> str:
        values = [partial.tokens(slice(None)) for partial in partials]
        y_TE.copy_(named(algorithm).twin(values, counters.hops(self._fed_back(hops, residue)), counters.stats))
        return "steps"

    def _exact_sum(self, given_RNE: Tensor) -> Tensor:
        return given_RNE.sum(dim=0)

    def _add_up_natively(self, partials: Sequence[Deferred]) -> Tensor:
        # A native sum has no twin: the order of its additions is the library's. A plain one stands for it.
        values = [partial.tokens(slice(None)) for partial in partials]
        hops, (num_tokens, num_features) = plain(values[0].dtype), values[0].shape
        return named(choose("auto", hops, num_tokens, num_features, self.tp_size)).twin(values, hops, None)

    def _gather_features(
        self, parts: Sequence[Tensor], codec: Codec, num_features: Sequence[int], counters: SiteCounters
    ) -> Tensor:
        return simulate.all_gather_features(parts, codec=counters.codec(codec), stats=counters.stats)

    def _gather_tokens(
        self, parts: Sequence[Tensor], codec: Codec, num_tokens: Sequence[int], counters: SiteCounters
    ) -> Tensor:
        return simulate.all_gather(parts, codec=counters.codec(codec), stats=counters.stats)

    def _all_to_all(
        self, parts: Sequence[Tensor], codec: Codec, counts: Sequence[Sequence[int]], counters: SiteCounters
    ) -> list[Tensor]:
        return simulate.all_to_all(parts, codec=counters.codec(codec), send_counts=counts, stats=counters.stats)

    def move(self, x: Tensor, site: str, copies: int) -> Tensor:
        x_TE, planned = x.reshape(-1, x.shape[-1]), self.sites.hops(site, x.dtype).codecs[0]
        counters = self.count_once(site, "boundary", x, len(x_TE), payload(planned, x_TE.shape, copies))
        if self._count_only:
            return x
        codec = counters.codec(planned)
        return simulate.send(x_TE, src=0, world_size=1, codec=codec, stats=counters.stats).view(x.shape)
