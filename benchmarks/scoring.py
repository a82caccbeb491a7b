"""What benchmarks of quality share: the bundled model, its text, and how far a plan moves its answers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import narrowcast
from narrowcast import Plan
from narrowcast.cli.files import DEFAULT_LENGTH, sequences
from narrowcast.evaluate import Score, compare, log_probs
from narrowcast.integrations import load_engine

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"


def text(name: str, limit: int) -> list[Tensor]:
    """Token ids [1, T] of the model's calibration.txt or scoring.txt, both sampled from it."""
    return sequences(load_engine().load_tokenizer(MODEL), MODEL / name, length=DEFAULT_LENGTH, limit=limit)


@dataclass(frozen=True)
class Scorer:
    """Scores of plans, simulated, against the uncompressed model; a sequence each, so that they can be paired."""

    model: nn.Module
    batches: Sequence[Tensor]
    reference: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor]) -> "Scorer":
        return cls(model, batches, [log_probs(model, ids) for ids in batches])

    def scores(self, plan: Plan) -> list[Score]:
        with narrowcast.attach(self.model, plan, simulate=True):
            found = [log_probs(self.model, ids) for ids in self.batches]
        return [compare([r], [f], [ids]) for r, f, ids in zip(self.reference, found, self.batches, strict=True)]


def figures(scores: Sequence[Score], base: Sequence[Score]) -> dict[str, Any]:
    """KL in nats, and how much more it is than that of `base`, with standard errors over sequences; top-1 agreement."""
    kl = [score.kl_nats for score in scores]
    more = [score.kl_nats - other.kl_nats for score, other in zip(scores, base, strict=True)]
    return {
        "kl_nats": statistics.mean(kl),
        "standard_error": standard_error(kl),
        "added_kl_nats": statistics.mean(more),
        "added_standard_error": standard_error(more),
        "top1_agreement": statistics.mean(score.top1_agreement for score in scores),
    }


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5
