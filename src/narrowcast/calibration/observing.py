"""Letting observers see what travels: from a whole model, or from the ranks of a split one."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from narrowcast.calibration.observers import exact_sum
from narrowcast.codecs import CastCodec
from narrowcast.collectives import Hops, Pending, all_gather_steps, choose, named
from narrowcast.engines import device_of, engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.feedback import Feedback
from narrowcast.runtime.sampling import Samples
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.runtime.wires import VirtualWires, Wires
from narrowcast.transport import Transport, transports_of


class Observer(Protocol):
    """Somebody who looks at the values that travel, of all ranks."""

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        """Look at the partial sums [..., E] of the ranks and at their sum."""
        ...

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Look at the columns [..., E0], [..., E1], ... of the ranks."""
        ...

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Look at values [..., E] that travel once; `ordered` unless tokens are on their way to experts or back."""
        ...


class ObservedWires(VirtualWires):
    """Wires over which values travel uncoded, and are seen on the way."""

    def __init__(self, observers: Sequence[Observer], tp_size: int, feedback: Feedback | None = None) -> None:
        super().__init__(tp_size, feedback)
        self._observers = observers

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        total = exact_sum(partials)
        for observer in self._observers:
            observer.see_sum(partials, total, site)
        return total

    def gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        for observer in self._observers:
            observer.see_columns(parts, site)
        return torch.cat(list(parts), dim=-1)

    def gather_tokens(self, parts: Sequence[Tensor], site: str, num_tokens: Sequence[int]) -> Tensor:
        return self.move(torch.cat(list(parts)), site, 0)

    def all_to_all(self, parts: Sequence[Tensor], site: str, counts: Sequence[Sequence[int]]) -> list[Tensor]:
        everything = torch.cat(list(parts))
        for observer in self._observers:
            observer.see(everything, site, ordered=False)
        cells = everything.split([count for row in counts for count in row])
        return [torch.cat(cells[rank :: self.tp_size]) for rank in range(self.tp_size)]

    def move(self, x: Tensor, site: str, copies: int) -> Tensor:
        for observer in self._observers:
            observer.see(x, site)
        return x


class CodedWires(ObservedWires):
    """Wires over which sums that feed back travel coded, as in a simulation of `plan`; all else travels uncoded.

    What is seen is what is coded then: partial sums and their sum, each with what was lost before. (Sums of nodes are
    seen without what was lost of those before.)
    """

    def __init__(self, observers: Sequence[Observer], plan: Plan) -> None:
        self._coded = {name: Hops(site.codecs, plan.groups) for name, site in plan.sites.items()}
        num_sources = plan.tp_size, 1, max(len(plan.groups), 1)
        super().__init__(observers, plan.tp_size, Feedback(plan.feedback.among(self._coded), num_sources))
        self._algorithm = "hierarchical" if plan.groups else "two_shot"

    @property
    def feed_back(self) -> bool:
        """Some sums do."""
        return self.feedback.any

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        if residue is None:
            return super().sum(partials, site)
        flat, before = [x.flatten(0, -2) for x in partials], residue.clone()
        hops, (num_tokens, num_features) = self._coded[site], flat[0].shape
        algorithm = named(choose(self._algorithm, hops, num_tokens, num_features, self.tp_size))
        total_TE = algorithm.twin(flat, self.feedback.hops(hops, residue), None)
        coded = [x.float() + lost for x, lost in zip(flat, before, strict=False)]
        received = exact_sum(coded) - residue[: self.tp_size].sum(dim=0)
        for observer in self._observers:
            observer.see_sum(coded, received + before[self.tp_size], site)
        return total_TE.view(partials[0].shape)


class SampledWires(ObservedWires):
    """Wires over which sums travel coded by an algorithm, as in a simulation of `plan`, and are all sampled.

    All of their tokens are compared. What is no sum travels uncoded, and is seen.
    """

    def __init__(self, observers: Sequence[Observer], plan: Plan, algorithm: str, device: torch.device) -> None:
        sites = Sites(
            {name: site.codecs for name, site in plan.sites.items()},
            plan.groups,
            algorithm,
            device,
            chains=plan.feedback,
            sample_every=1,
            sample_tokens=sys.maxsize,
        )
        self._simulator = Simulator(sites, plan.tp_size)
        super().__init__(observers, plan.tp_size, self._simulator.feedback)

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        return self._simulator.sum(partials, site, residue)

    @property
    def samples(self) -> dict[str, Samples]:
        """Those of each site of the plan that has added up."""
        reports = self._simulator.sites.report().sites
        return {name: site.samples for name, site in reports.items() if site.coded and site.samples is not None}


class GatheringCommunicator(Communicator):
    """A communicator that gathers the values of all ranks, so that observers on each see them as in a whole model.

    So calibration of a split model ends with the same plan as that of the whole one, on every rank.
    """

    def __init__(
        self, observed: ObservedWires, tp: Transport | None, pp: Transport | None, *, device: torch.device
    ) -> None:
        super().__init__(Sites({}, (), "auto", device), tp=tp, pp=pp)
        self._observed, self.feedback = observed, observed.feedback

    def sum_products(self, x: Tensor, site: str, residue: Tensor | None = None) -> Tensor:
        return Wires.sum_products(self, x, site, residue)

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        (x,) = partials
        x_TE = x.reshape(-1, x.shape[-1])
        return self._observed.sum(self._gather(x_TE, [len(x_TE)] * self.tp_size), site, residue).view(x.shape)

    def gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        (x,) = parts
        num_tokens, num_features = x.shape[:-1].numel(), self.columns(site)
        columns = self._gather(x.reshape(-1, 1), [num_tokens * num for num in num_features])
        shaped = [part.view(num_tokens, num) for part, num in zip(columns, num_features, strict=True)]
        return self._observed.gather_features(shaped, site).view(*x.shape[:-1], -1)

    def gather_tokens(self, parts: Sequence[Tensor], site: str, num_tokens: Sequence[int]) -> Tensor:
        return self._observed.gather_tokens(self._gather(parts[0], num_tokens), site, num_tokens)

    def all_to_all(self, parts: Sequence[Tensor], site: str, counts: Sequence[Sequence[int]]) -> list[Tensor]:
        everything = self._gather(parts[0], [sum(row) for row in counts])
        return [self._observed.all_to_all(everything, site, counts)[self.tp.rank]]

    def send(self, x: Tensor, site: str, *, dst: int) -> None:
        super().send(x, site, dst=dst)
        self._observed.move(x, site, 0)

    def recv(self, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._observed.move(super().recv(shape, site, src=src, dtype=dtype, device=device), site, 0)

    def broadcast(
        self, x: Tensor | None, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return self._observed.move(super().broadcast(x, shape, site, src=src, dtype=dtype, device=device), site, 0)

    def _gather(self, x_TE: Tensor, num_tokens: Sequence[int]) -> list[Tensor]:
        """The rows of each rank."""
        steps = all_gather_steps(x_TE, CastCodec(dtype=x_TE.dtype), num_tokens, self.tp.rank)
        return list(Pending(steps, self.tp).wait().split(list(num_tokens)))


def observed(observers: Sequence[Observer], model: nn.Module, split: Split) -> AbstractContextManager[None]:
    """Let observers see what all ranks send each other: of a whole model, or gathered from those of a split one."""
    return over_wires(ObservedWires(observers, split.tp_size), model, split)


@contextmanager
def over_wires(whole: ObservedWires, model: nn.Module, split: Split) -> Iterator[None]:
    """Let the values of all ranks travel over `whole`: of a whole model, or gathered from those of a split one."""
    engine, wires = engine_of(model), cast(Wires, whole)
    if engine.split_of(model) != Split():
        wires = GatheringCommunicator(whole, *transports_of(engine.groups(model)), device=device_of(model))
    forwards = engine.take_over(model, split, wires)
    try:
        with evaluating(model):
            yield
    finally:
        forwards.restore()


def run(model: nn.Module, ids: Tensor) -> None:
    """One sequence [T] through the model."""
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
