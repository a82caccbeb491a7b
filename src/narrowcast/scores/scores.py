"""Scores of a coded model on text: KL divergence, agreement, perplexity; by sequence, so that they can be paired."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from narrowcast.engines import device_of
from narrowcast.scores.intervals import Interval, Items

PERCENTILES = 50, 90, 99, 99.9, 100
FIGURES = "kl_nats", "top1_agreement", "top5_agreement"  # of what both models say next


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Score:
    """A coded model against the uncompressed one, the reference, on the same text.

    `by_sequence`, each of them a mean over a sequence's tokens:
    - `kl_nats`: KL(reference || model) in nats.
    - `top1_agreement`: share of tokens for which both rank the same next token first.
    - `top5_agreement`: share of tokens for which the reference's first is among the model's five first.
    - `nll_nats`: negative log-likelihood of the text's own next tokens; `reference_nll_nats`: the reference's.
    `kl_by_token`: fp32 [N] of all tokens, in no useful order.
    """

    by_sequence: Mapping[str, Items]
    reference_nll_nats: Items
    kl_by_token: NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """Positions that were scored."""
        return sum(self.by_sequence["kl_nats"].weights)

    @property
    def kl_nats(self) -> float:
        """Mean over tokens."""
        return self.by_sequence["kl_nats"].mean

    @property
    def top1_agreement(self) -> float:
        """Share of tokens."""
        return self.by_sequence["top1_agreement"].mean

    @property
    def top5_agreement(self) -> float:
        """Share of tokens."""
        return self.by_sequence["top5_agreement"].mean

    @property
    def perplexity(self) -> float:
        """Of the model on the text's next tokens."""
        return math.exp(self.by_sequence["nll_nats"].mean)

    @property
    def reference_perplexity(self) -> float:
        """Of the reference on the same tokens."""
        return math.exp(self.reference_nll_nats.mean)

    @property
    def perplexity_change(self) -> float:
        """Relative to the reference: 0.01 for one percent more."""
        return math.expm1(self._added_nll_nats.mean)

    @property
    def kl_percentiles(self) -> dict[str, float]:
        """KL in nats that so many percent of tokens do not exceed; of 100, the largest."""
        return {f"{each:g}": float(np.percentile(self.kl_by_token, each)) for each in PERCENTILES}

    @property
    def intervals(self) -> dict[str, Interval | None]:
        """95 % confidence intervals of the means, over sequences; None from a single one.

        That of the change of perplexity is paired with the reference.
        """
        found = {name: items.interval() for name, items in self.by_sequence.items()}
        nll, added = found.pop("nll_nats"), self._added_nll_nats.interval()
        return {
            "perplexity": nll and Interval(*map(math.exp, nll)),
            "perplexity_change": added and Interval(*map(math.expm1, added)),
            "kl_nats": _inside(found.pop("kl_nats"), 0.0, math.inf),
            **{name: _inside(interval, 0.0, 1.0) for name, interval in found.items()},
        }

    @property
    def _added_nll_nats(self) -> Items:
        return self.by_sequence["nll_nats"] - self.reference_nll_nats

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, without the KL of single tokens."""
        figures = "perplexity", "perplexity_change", "kl_nats", "kl_percentiles", "top1_agreement", "top5_agreement"
        return {figure: getattr(self, figure) for figure in (*figures, "num_tokens", "intervals")} | {
            "by_sequence": {name: asdict(items) for name, items in self.by_sequence.items()},
            "reference_nll_nats": asdict(self.reference_nll_nats),
        }


@torch.no_grad()
def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T, V] in fp32 on the CPU, for token ids [B, T]."""
    output = model(input_ids=ids.to(device_of(model)), use_cache=False)
    logits: Tensor = getattr(output, "logits", output)
    return logits.float().log_softmax(dim=-1).cpu()


def kl_nats(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) [...] of log-probabilities [..., V], in nats, fp64."""
    expected, found = expected.double(), found.double()
    return (expected.exp() * (expected - found)).sum(-1)


class Scorer:
    """Score a coded model beside the reference, batch by batch: nothing but figures is kept of a batch."""

    def __init__(self) -> None:
        self._kl_by_token: list[NDArray[np.float32]] = []
        self._rows: list[tuple[float, ...]] = []

    def add(self, expected_BTV: Tensor, found_BTV: Tensor, ids_BT: Tensor) -> None:
        """Log-probabilities of the reference and of the model. Each row is a sequence of two tokens or more."""
        for sequence in zip(expected_BTV, found_BTV, ids_BT, strict=True):
            kl_T, row = _compared(*sequence)
            self._kl_by_token.append(kl_T)
            self._rows.append(row)

    @property
    def num_sequences(self) -> int:
        """Sequences that were added."""
        return len(self._rows)

    def score(self) -> Score:
        """The score of all that was added, one batch or more."""
        lengths = tuple(map(len, self._kl_by_token))
        predicted = tuple(length - 1 for length in lengths)  # nothing tells the first token of a sequence
        *figures, nll, reference_nll = zip(*self._rows, strict=True)
        by_sequence = {
            name: Items(values=values, weights=lengths) for name, values in zip(FIGURES, figures, strict=True)
        }
        return Score(
            by_sequence={**by_sequence, "nll_nats": Items(values=nll, weights=predicted)},
            reference_nll_nats=Items(values=reference_nll, weights=predicted),
            kl_by_token=np.concatenate(self._kl_by_token),
        )


def compare(reference: Iterable[Tensor], model: Iterable[Tensor], batches: Sequence[Tensor]) -> Score:
    """Score `model` against `reference`: log-probabilities [B, T, V] of both for each batch of ids [B, T].

    Batches are taken one at a time.
    """
    found = Scorer()
    for batch in zip(reference, model, batches, strict=True):
        found.add(*batch)
    return found.score()


def _compared(expected_TV: Tensor, found_TV: Tensor, ids_T: Tensor) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """KL of each token of a sequence; the sequence's `FIGURES`, its NLL, and that of the reference."""
    expected_TV, found_TV = expected_TV.double(), found_TV.double()
    kl_T = kl_nats(expected_TV, found_TV)
    first_T = expected_TV.argmax(-1)
    before_T = (found_TV > found_TV.gather(-1, first_T[:, None])).sum(-1)  # tokens that the model ranks before it
    nll, reference_nll = (
        -each_TV[:-1].gather(-1, ids_T[1:, None]).mean().item() for each_TV in (found_TV, expected_TV)
    )
    top1, top5 = first_T == found_TV.argmax(-1), before_T < 5
    means = (each_T.double().mean().item() for each_T in (kl_T, top1, top5))
    return kl_T.float().numpy(), (*means, nll, reference_nll)


def _inside(interval: Interval | None, low: float, high: float) -> Interval | None:
    return interval and Interval(max(low, interval.low), min(high, interval.high))
