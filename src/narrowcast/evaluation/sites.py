"""The error by site: what each alone adds to the KL divergence."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from narrowcast.evaluation.scoring import scored, standing_by
from narrowcast.plan import Plan
from narrowcast.runtime.reports import SiteReport
from narrowcast.scores import Items


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """One site coded, all others plain. `added_kl_nats` by sequence: more than with no site coded at all.

    The split alone rounds otherwise than the whole model, which no site is to blame for. `report`: what it sent, and
    how many of its values were clipped.
    """

    site: str
    added_kl_nats: Items
    report: SiteReport


def site_errors(
    model: nn.Module, plan: Plan, batches: Iterable[Tensor], reference: Iterable[Tensor], **options: Any
) -> list[SiteError]:
    """The error of each site of `plan`, simulated on a whole model: a forward a site and batch of ids [B, T].

    `reference`: the uncompressed model's log-probabilities [B, T, V] of each batch. `options`: those of `attach`.
    """
    sites = list(plan.sites)
    plans = [plan.only(()), *(plan.only([site]) for site in sites)]
    with standing_by(model, plans, simulate=True, **options) as handles:
        plain, *scores = (score.by_sequence["kl_nats"] for score in scored(model, handles, batches, reference))
        reports = [handle.report() for handle in handles[1:]]
    return [
        SiteError(site=site, added_kl_nats=kl - plain, report=report.sites[site])
        for site, kl, report in zip(sites, scores, reports, strict=True)
    ]
