"""What benchmarks of quality share: the bundled model, its text, and how far a plan moves its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from narrowcast import Plan
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.scores import Score, log_probs

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"


def text(name: str, limit: int) -> list[Tensor]:
    """Token ids [1, T] of the model's calibration.txt or scoring.txt, both sampled from it."""
    return sequences(load_engine().load_tokenizer(MODEL), MODEL / name, length=DEFAULT_LENGTH, limit=limit)


@dataclass(frozen=True)
class Scorer:
    """Scores of plans, simulated, against the uncompressed model."""

    model: nn.Module
    batches: Sequence[Tensor]
    reference: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor]) -> "Scorer":
        return cls(model, batches, [log_probs(model, ids) for ids in batches])

    def score(self, plan: Plan) -> Score:
        return evaluate(self.model, plan, self.batches, reference=self.reference).score


def figures(score: Score, base: Score) -> dict[str, Any]:
    """KL in nats, and how much more it is than that of `base`, with standard errors over sequences; top-1 agreement."""
    kl = score.by_sequence["kl_nats"]
    added = kl - base.by_sequence["kl_nats"]
    return {
        "kl_nats": kl.mean,
        "standard_error": kl.standard_error,
        "added_kl_nats": added.mean,
        "added_standard_error": added.standard_error,
        "top1_agreement": score.top1_agreement,
    }
