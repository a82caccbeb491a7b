"""Draws docs/feedback.png: how far the residual stream is off at each depth, with depth feedback and without.

usage: python docs/feedback_picture.py [docs/feedback.png]     (after `make model`)

SmolLM2-135M in FP32, TP 8 simulated, two_shot, sums in `int4-feature`; calibrated and scored on samples of its own.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import narrowcast
from narrowcast.calibration import observe
from narrowcast.calibration.text import sequences
from narrowcast.engines import load_engine

MODEL = Path(__file__).parents[1] / "models" / "smollm2-135m"
TP_SIZE, NUM_CALIBRATION, NUM_SCORED = 8, 12, 4
ALIKE = {"sum": "int4-feature", "last": "int4-feature"}
LINES: dict[str, tuple[Any, bool, str]] = {
    "what is lost is lost": (ALIKE, False, "#6b7280"),
    "what is lost is fed back": (ALIKE, True, "#93c5fd"),
    "and the last sum has 8 bits": ("int4-feature", True, "#1d4ed8"),
}


@contextmanager
def streams(model: Any) -> Iterator[list[Tensor]]:
    """The stream [B, T, E] after each layer, once the model has run."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, given, output: seen.append(output.float()))
        for layer in model.model.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def errors(model: Any, plan: narrowcast.Plan, text: list[Tensor]) -> list[float]:
    """RMS error after each layer, relative to the stream: the median over tokens, of which the first are huge."""
    found: list[Tensor] = []
    for ids in text:
        with torch.no_grad():
            with streams(model) as exact:
                model(ids)
            with narrowcast.attach(model, plan, simulate=True, algorithm="two_shot"), streams(model) as coded:
                model(ids)
        found.append(
            torch.stack([((y - x).norm(dim=-1) / x.norm(dim=-1))[0] for x, y in zip(exact, coded, strict=True)])
        )
    return torch.cat(found, dim=1).median(dim=1).values.tolist()


def main() -> None:
    """Measure and draw."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("feedback.png")
    engine = load_engine()
    model, tokenizer = engine.load(MODEL).float(), engine.load_tokenizer(MODEL)
    calibration = sequences(tokenizer, MODEL / "calibration.txt", length=256, limit=NUM_CALIBRATION)
    text = sequences(tokenizer, MODEL / "scoring.txt", length=256, limit=NUM_SCORED)
    seen = observe(model, calibration, tp_size=TP_SIZE)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for label, (codec, feedback, colour) in LINES.items():
        found = errors(model, seen.plan(codec, feedback=feedback), text)
        axes.semilogy(range(1, len(found) + 1), found, color=colour, marker=".", label=label)
        print(label, *(f"{error:.4f}" for error in found))
    axes.legend(frameon=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the stream, relative")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("SmolLM2-135M over 8 ranks, sums in 4.19 bits (two_shot)", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
