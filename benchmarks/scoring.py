"""The bundled model, its text, and how far a plan moves its answers: for benchmarks of quality."""

import argparse
import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast import Plan
from narrowcast.calibration import moments_needed, observe, recipes_by_kind
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.scores import Score, log_probs

SEED = 5
MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"


def text(name: str, limit: int) -> list[Tensor]:
    """Token ids [1, T] of the model's calibration.txt or scoring.txt, both sampled from it."""
    return sequences(load_engine().load_tokenizer(MODEL), MODEL / name, length=DEFAULT_LENGTH, limit=limit)


def setting_of(batches: Sequence[Tensor]) -> dict[str, Any]:
    """The model and the size of the text, for a result."""
    return {"model": MODEL.name, "num_sequences": len(batches), "num_tokens": sum(ids.numel() for ids in batches)}


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


@dataclass(frozen=True)
class Texts(Scorer):
    """A model with texts of one's choice: `calibration` ids [1, T], and the batches that plans are scored on."""

    folder: Path
    calibration: Sequence[Tensor]
    setting: dict[str, Any]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Let `parser` take what `of` needs."""
        parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER")
        parser.add_argument("--calibrate", type=Path, default=MODEL / "calibration.txt", metavar="TEXT")
        parser.add_argument("--score", type=Path, default=MODEL / "scoring.txt", metavar="TEXT")
        parser.add_argument("--calibration-sequences", type=int, default=64)
        parser.add_argument("--sequences", type=int, default=16)

    @classmethod
    def of(cls, asked: argparse.Namespace, *, in_fp32: bool = False) -> "Texts":  # type: ignore[override]
        """The model and texts of a command line."""
        engine = load_engine()
        model, tokenizer = engine.load(asked.model), engine.load_tokenizer(asked.model)
        model = model.float() if in_fp32 else model
        batches = places(tokenizer, asked.score, asked.sequences)
        return cls(
            model=model,
            batches=batches,
            reference=[log_probs(model, ids) for ids in batches],
            folder=asked.model,
            calibration=places(tokenizer, asked.calibrate, asked.calibration_sequences),
            setting={
                "model": asked.model.parent.name if asked.model.name == "hf" else asked.model.name,
                "calibrated_on": asked.calibrate.name,
                "scored_on": asked.score.name,
                "num_calibration_sequences": asked.calibration_sequences,
                "num_sequences": asked.sequences,
            },
        )


def planned(folder: Path, text: Path, *, number: int = 16, tp_size: int, codec: str) -> Plan:
    """A plan of `codec` for the model of a folder, made in FP32 on so many places of a text, not measured."""
    engine = load_engine()
    seen = observe(
        engine.load(folder, dtype="float32"),
        places(engine.load_tokenizer(folder), text, number),
        tp_size=tp_size,
        moments=moments_needed(recipes_by_kind(codec)),
    )
    return seen.plan(codec, measured=False)


def places(tokenizer: Any, path: Path, number: int) -> list[Tensor]:
    """Ids [1, DEFAULT_LENGTH] from random places of a text, perhaps compressed."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf8") as file:
        text, chance = file.read(), random.Random(SEED)
    found: list[Tensor] = []
    while len(found) < number:
        start = chance.randrange(max(1, len(text) - 6000))
        ids = tokenizer(text[start : start + 6000], verbose=False).input_ids[4 : 4 + DEFAULT_LENGTH]
        if len(ids) == DEFAULT_LENGTH:
            found.append(torch.tensor([ids]))
    return found
