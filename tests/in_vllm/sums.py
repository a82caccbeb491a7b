"""Sums that serving.py recorded, against the simulation of what ranks put in."""

import torch
from torch import Tensor

from narrowcast.plan import Plan
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from running import Run

Recorded = list[tuple[str, Tensor, Tensor]]


def recorded(served: Run) -> list[Recorded]:
    """Site, what was put in and what came out, of each sum, by rank."""
    return [torch.load(f"{served.out}.{rank}") for rank in range(2)]


def as_simulated(served: Run, plan: Plan) -> tuple[Recorded, Simulator]:
    """What rank 0 recorded, and the simulator of the plan, after every sum came out on both ranks as it has it."""
    codecs = {name: site.codecs for name, site in plan.sites.items()}
    simulator = Simulator(Sites(codecs, (), "auto", torch.device("cpu"), chains=plan.feedback), 2)
    first, second = recorded(served)
    for (site, given, total), (other_site, other, other_total) in zip(first, second, strict=True):
        assert site == other_site
        expected = simulator.sum([given, other], site, simulator.residue(site, *given.shape, given.device))
        assert torch.equal(total, expected) and torch.equal(other_total, expected), site
    return first, simulator
