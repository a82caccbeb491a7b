"""Where the error comes from: what each site alone adds to the KL divergence."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from narrowcast.attach import attach
from narrowcast.plan import Plan
from narrowcast.runtime.counters import Report, SiteReport
from narrowcast.scores import Items, Score, compare, log_probs


def score_simulated(
    model: nn.Module, plan: Plan, reference: Iterable[Tensor], batches: Sequence[Tensor], *, algorithm: str = "auto"
) -> tuple[Score, Report]:
    """The score of `plan` on a whole model, and what its ranks would send; reference and batches as in `compare`."""
    with attach(model, plan, simulate=True, algorithm=algorithm) as handle:
        score = compare(reference, (log_probs(model, ids) for ids in batches), batches)
    return score, handle.report()


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
    model: nn.Module, plan: Plan, reference: Iterable[Tensor], batches: Sequence[Tensor], *, algorithm: str = "auto"
) -> Iterator[SiteError]:
    """One run over `batches` for each site of `plan`, and one without any, simulated on a whole model.

    `reference`: log-probabilities [B, T, V] of the uncompressed model for each batch of ids [B, T], read once a run.
    """
    plain, _ = score_simulated(model, plan.only(()), reference, batches, algorithm=algorithm)
    for site in plan.sites:
        score, report = score_simulated(model, plan.only([site]), reference, batches, algorithm=algorithm)
        added = score.by_sequence["kl_nats"] - plain.by_sequence["kl_nats"]
        yield SiteError(site=site, added_kl_nats=added, report=report.sites[site])
