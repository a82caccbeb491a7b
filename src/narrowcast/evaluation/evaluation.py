"""The findings of an evaluation, and the conditions under which they hold."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from narrowcast.aligned import aligned
from narrowcast.evaluation.sites import SiteError
from narrowcast.evaluation.tasks import AnsweredTasks
from narrowcast.plan import Plan
from narrowcast.runtime.reports import Report
from narrowcast.scores import Score, written
from narrowcast.scores.verdict import in_words

FIGURES = {  # of a score: what they are called, and how they are written
    "kl_nats": ("KL, nats", "{:.5f}"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "top5_agreement": ("top-5 agreement", "{:.2%}"),
    "perplexity": ("perplexity", "{:.4f}"),
    "perplexity_change": ("change of perplexity", "{:+.3%}"),
}
NUM_PROMPT, NUM_SHOWN = 24, 10  # tokens of the text that both models continue, and of what they add


@dataclass(frozen=True, kw_only=True)
class Continued:
    """Token ids of a beginning of the text that was scored, and what either model adds to it, greedily."""

    prompt: Sequence[int]
    uncompressed: Sequence[int]
    coded: Sequence[int]


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """A plan's effect on a model's answers: `score` against the uncompressed model, `report` of what was sent.

    Printed, it is a table.

    `reference`: the uncompressed model was "whole", or "split" over the ranks, which rounds otherwise. `feedback`: what
    a sum lost was fed back where the plan says so. `continued`: a few tokens that both say. If asked for: errors by
    site, and answers to zero-shot tasks.
    """

    plan: Plan
    conditions: Mapping[str, Any]
    reference: Literal["whole", "split"]
    real: bool
    feedback: bool
    score: Score
    report: Report
    continued: Continued
    sites: Sequence[SiteError] = ()
    tasks: AnsweredTasks | None = None

    def __repr__(self) -> str:
        return f"Evaluation({self.plan!r}, KL {self.score.kl_nats:.3g} nats: {in_words(self.score.kl_nats)})"

    def __str__(self) -> str:
        return f"{self!r}\n\n{aligned([('figure', 'value', 'uncompressed', '95 % interval'), *self.figures()])}"

    def figures(self) -> list[tuple[str, str, str, str]]:
        """Names of figures, their values, those of the uncompressed model, and 95 % intervals, as users read them."""
        score = self.score
        own = {"perplexity": FIGURES["perplexity"][1].format(score.reference_perplexity)}
        rows = [
            (what, form.format(getattr(score, name)), own.get(name, ""), written(score.intervals[name], form))
            for name, (what, form) in FIGURES.items()
        ]
        for percentile, value in score.kl_percentiles.items():
            what = "largest KL of a token" if percentile == "100" else f"KL, {percentile} % of tokens at most"
            rows.append((what, f"{value:.5f}", "", ""))
        rows.append(("tokens scored", str(score.num_tokens), "", ""))
        return rows

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, which a later evaluation can be compared with."""
        errors = {
            each.site: {"added_kl_nats": each.added_kl_nats.mean, "interval": each.added_kl_nats.interval()}
            for each in self.sites
        }
        return {
            **self.conditions,
            "reference": self.reference,
            "plan_fingerprint": self.plan.fingerprint,
            "real": self.real,
            "feedback": self.feedback,
            "verdict": in_words(self.score.kl_nats),
            "continued": asdict(self.continued),
            **self.score.to_json(),
            **self.report.to_json(),
            "site_errors": errors,
            **({} if self.tasks is None else {"tasks": self.tasks.to_json()}),
        }


def beginning(batches: Sequence[Tensor]) -> Tensor:
    """Ids [1, T] of the first tokens of the text, for both models to continue."""
    return batches[0][:1, :NUM_PROMPT]


def conditions(plan: Plan, batches: Sequence[Tensor], algorithm: str) -> dict[str, Any]:
    """In what two evaluations must agree for their figures to be compared: in all but the plan's codecs."""
    digest = hashlib.sha256()
    for ids in batches:
        digest.update(f"{list(ids.shape)}".encode() + ids.cpu().numpy().tobytes())
    return {
        "model_fingerprint": plan.model.digest,
        **asdict(plan.split),
        "algorithm": algorithm,
        "max_seq_len": max(ids.shape[1] for ids in batches),
        "num_samples": sum(map(len, batches)),
        "text_sha256": digest.hexdigest(),
    }
