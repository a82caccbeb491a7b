"""One metric for all sums of a stream, in which transforms weigh errors under depth feedback.

What the axes of one site leave unsent is passed on to the next, which leaves a part of it unsent again. Each of these
steps is a projection, orthogonal where lengths are measured by the Fisher information at that site. In a row of
projections, each orthogonal in another metric, an error may grow without bound; in one metric it never does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from narrowcast.calibration.sensitivity import Sensitivity
from narrowcast.plan.chains import Chains

ROUND = 0.1  # of the mean: as much all directions count besides (decision 0032)


def in_common(fishers: Mapping[str, Tensor], tried: Mapping[str, Sensitivity], chains: Chains) -> dict[str, Tensor]:
    """The stand-in for the Fisher information [E, E] of each site: at sites of a chain, a multiple of one for all.

    The multiple has the mean diagonal of the site's own, times the share of it that an error costs which is made good
    at the next site (`tried`).
    """
    found = dict(fishers)
    for chain in chains.chains:
        own = [site for site in chain if site in fishers]
        means = {site: fishers[site].diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny) for site in own}
        metric = torch.stack([fishers[site] / means[site] for site in own]).mean(dim=0)
        metric += ROUND * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        for site in own:
            lasting = tried[site].lasting.mean().clamp(min=torch.finfo(torch.float32).tiny)  # nothing may matter
            until_next = tried[site].fed_back.mean() / lasting
            found[site] = metric * means[site] * until_next.to(metric.device)
    return found
