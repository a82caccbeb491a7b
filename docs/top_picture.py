"""Draws docs/top.svg: what `narrowcast monitor top` shows of a model at work, one of whose layers has gone wrong.

usage: python docs/top_picture.py [docs/top.svg]

The bundled model, TP 4 simulated, by the plan that `calibrate` makes; all of its sums are sampled. It reads prompts of
64 tokens and generates 32 each; then the tokens that enter one MLP are 20 times as large.
"""

import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console

import narrowcast
from narrowcast import Plan
from narrowcast.attaching import Handle
from narrowcast.calibration.text import sequences
from narrowcast.cli.tables import PAGE
from narrowcast.cli.top import picture
from narrowcast.engines import load_engine
from narrowcast.monitoring import Snapshot
from narrowcast.monitoring.figures import History
from narrowcast.monitoring.metrics import collector_of
from narrowcast.monitoring.scrape import Scrape

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"
TP_SIZE, LAYER, TIMES = 4, 4, 20.0
NUM_PROMPTED, NUM_GENERATED = 64, 32


class Figures:
    """All that is told of the model, requests too, one after another."""

    def __init__(self, plan: Plan, handle: Handle) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"labelnames": ["model_name"], "registry": self.registry}
        self.read = Counter("vllm:prompt_tokens", "-", **options).labels(MODEL.name)
        self.generated = Counter("vllm:generation_tokens", "-", **options).labels(MODEL.name)
        self.first = Histogram("vllm:time_to_first_token_seconds", "-", **options).labels(MODEL.name)
        self.gap = Histogram("vllm:inter_token_latency_seconds", "-", **options).labels(MODEL.name)
        for name, number in (("running", 1), ("waiting", 0)):
            Gauge(f"vllm:num_requests_{name}", "-", **options).labels(MODEL.name).set(number)
        self.registry.register(
            collector_of(lambda: [Snapshot.of(handle.report(), plan, rank=0, num_ranks=1, transport="simulated")])
        )

    def scrape(self) -> Scrape:
        return Scrape.of(generate_latest(self.registry).decode())


def serve(model: Any, ids: torch.Tensor, figures: Figures) -> None:
    """Read a prompt and generate, greedily."""
    given, cache = ids[:, :NUM_PROMPTED], None
    for step in range(NUM_GENERATED):
        begun = time.perf_counter()
        with torch.no_grad():
            out = model(given, past_key_values=cache, use_cache=True)
        given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        (figures.gap if step else figures.first).observe(time.perf_counter() - begun)
        figures.generated.inc()
    figures.read.inc(NUM_PROMPTED)


def main() -> None:
    """Draw it."""
    torch.set_num_threads(1)
    engine, times = load_engine(), [1.0]
    model, tokenizer = engine.load(MODEL, dtype="float32"), engine.load_tokenizer(MODEL)
    calibrating, prompts = (
        sequences(tokenizer, MODEL / f"{name}.txt", length=256, limit=limit)
        for name, limit in (("calibration", 128), ("scoring", 12))
    )
    plan, history = narrowcast.calibrate(model, calibrating, tp_size=TP_SIZE), History()
    model.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(lambda module, given: (given[0] * times[0],))
    with narrowcast.attach(model, plan, simulate=True, sample_every=1) as handle:
        figures = Figures(plan, handle)
        for number, ids in enumerate(prompts):
            times[0] = TIMES if number >= len(prompts) // 2 else 1.0
            serve(model, ids, figures)
            history.add(figures.scrape())
    console = Console(file=io.StringIO(), record=True, width=PAGE, force_terminal=True)
    console.print(picture(history.figures(), "http://127.0.0.1:8000"))
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "top.svg"
    path.write_text(console.export_svg(title="narrowcast monitor top http://127.0.0.1:8000"), encoding="utf8")


if __name__ == "__main__":
    main()
