"""A plan at work: looks up a site's codecs, runs the collective, counts what travels.

`Communicator` works on the ranks of a group, `Simulator` on the partial sums of all ranks in one process.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from narrowcast.codecs import CastCodec
from narrowcast.collectives import ALGORITHMS, Pending, all_gather_steps, all_reduce_steps, choose, simulate
from narrowcast.collectives.base import Stages
from narrowcast.monitor import Kind, Monitor
from narrowcast.plan import Plan
from narrowcast.transport import Transport


class Communicator:
    """Sums and gathers of one rank, over `transport`, as `plan` has them."""

    def __init__(self, plan: Plan, transport: Transport, *, algorithm: str, device: torch.device) -> None:
        self.transport = transport
        self.monitor = Monitor(device)
        self._algorithm = algorithm
        self._stages = stages_on(plan, device)
        self._chosen: dict[tuple[str, int], str] = {}

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        """Sum partial sums `x` [..., E] with the site's codecs."""
        return self._all_reduce(x, site, self._stages[site], "coded")

    def all_reduce_uncompressed(self, x: Tensor, site: str) -> Tensor:
        """Sum `x` [..., E] at a site that the plan does not code, each value in its own dtype."""
        return self._all_reduce(x, site, Stages((CastCodec(dtype=x.dtype),) * 2), "uncompressed")

    def all_gather_features(self, x: Tensor, site: str, num_features: Sequence[int]) -> Tensor:
        """Concatenate the last dimension over ranks, uncompressed; rank r holds `num_features[r]` of it."""
        counters = self.monitor.site(site, "uncompressed")
        flat = x.reshape(-1, 1)
        num_tokens = math.prod(x.shape[:-1])
        counters.num_tokens += num_tokens
        counts = [num_tokens * count for count in num_features]
        steps = all_gather_steps(flat, CastCodec(dtype=x.dtype), counts, self.transport.rank)
        parts = Pending(steps, self.transport, counters.count_sent).wait().split(counts)
        shaped = [part.view(*x.shape[:-1], count) for part, count in zip(parts, num_features, strict=True)]
        return torch.cat(shaped, dim=-1)

    def _all_reduce(self, x: Tensor, site: str, stages: Stages, kind: Kind) -> Tensor:
        counters = self.monitor.site(site, kind)
        num_tokens, world_size = math.prod(x.shape[:-1]), self.transport.world_size
        counters.num_tokens += num_tokens
        key = site, min(num_tokens, world_size)  # more tokens than ranks do not change the choice
        if key not in self._chosen:
            self._chosen[key] = choose(self._algorithm, stages, num_tokens, x.shape[-1], world_size)
        steps = all_reduce_steps(x, stages, self.transport, self._chosen[key], counters.stats)
        return Pending(steps, self.transport, counters.count_sent).wait()


class Simulator:
    """The same sums for all ranks at once: equal bits. Bytes are counted as rank 0 sends them, clipping for all."""

    def __init__(self, plan: Plan, *, algorithm: str, device: torch.device) -> None:
        self.monitor = Monitor(device)
        self._tp_size, self._algorithm = plan.tp_size, algorithm
        self._stages = stages_on(plan, device)

    def all_reduce(self, partials: Sequence[Tensor], site: str) -> Tensor:
        """Sum the partial sums [..., E] of all ranks with the site's codecs."""
        stages, counters = self._stages[site], self.monitor.site(site, "coded")
        num_features = partials[0].shape[-1]
        num_tokens = math.prod(partials[0].shape[:-1])
        counters.num_tokens += num_tokens
        name = choose(self._algorithm, stages, num_tokens, num_features, self._tp_size)
        sent = ALGORITHMS[name].sent(stages, num_tokens, num_features, 0, self._tp_size)
        assert sent is not None, "`choose` names only algorithms that can run"
        counters.count_sent(sent)
        return simulate.all_reduce(partials, codec=stages.codecs, algorithm=self._algorithm, stats=counters.stats)


def stages_on(plan: Plan, device: torch.device) -> Mapping[str, Stages]:
    """The plan's codecs by site, with their tensors on `device`."""
    return {name: Stages(tuple(codec.to(device) for codec in site.codecs)) for name, site in plan.sites.items()}
