"""Decoding steps on ranks, layers as recorded and by their modules, block by block in turns in one process.

usage: python benchmarks/scheduled.py [--model PATH] [--codec CODEC] [--tp N] [--weights W] [--json FILE]

One text, one thread a rank, on loopback. Wall-clock time, and the processor's time of rank 0's thread, a step: least
and median. By default of a thin Llama of eight layers, whose steps are nearly all Python. Ranks that spin while they
wait spend the processor's time, too: LOCAL_WORLD_SIZE=3 keeps two from that on two cores.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import reporting
import torch

from narrowcast import Plan, attach
from narrowcast.calibration import observe
from narrowcast.engines import load_engine
from narrowcast.engines.parts import load_part
from narrowcast.engines.transformers.decoding import recorded
from narrowcast.engines.transformers.files.random_llama import save_random_llama
from narrowcast.launch import run
from narrowcast.perf.machine import machine

PROMPT, BLOCKS, STEPS = 256, 16, 48
THIN = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_layers": 8, "num_heads": 4}


@contextmanager
def by_modules() -> Iterator[None]:
    recorded.ATTEMPTS, attempts = 0, recorded.ATTEMPTS
    try:
        yield
    finally:
        recorded.ATTEMPTS = attempts


def on_rank(path: Path, plan_path: Path, weights: Any) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    plan, engine = Plan.load(plan_path), load_engine()
    if path.is_dir():
        model = engine.load(path, weights=weights, split=plan.split)
    else:
        model = load_part(engine, path, split=plan.split, replicated="embedding")
    ids = torch.arange(PROMPT)[None] % 500
    recorded = attach(model, plan)
    recorded.suspend()
    plain = attach(model, plan)
    plain.suspend()
    taken: dict[str, list[tuple[float, float]]] = {"recorded": [], "modules": []}
    answers = {}
    with torch.no_grad():
        for block in range(2 * BLOCKS):
            name, handle = ("recorded", recorded) if block % 2 else ("modules", plain)
            handle.resume()
            with by_modules() if handle is plain else nullcontext():
                answers[name] = timed(model, ids, taken[name])
            handle.suspend()
    assert answers["recorded"] == answers["modules"]
    rows = []
    for name, times in taken.items():
        for kind, values in zip(("wall", "cpu"), zip(*times, strict=True), strict=True):
            least, median = min(values) * 1e3, statistics.median(values) * 1e3
            rows.append({"layers": name, "time": kind, "least_ms": least, "median_ms": median})
    return rows


def timed(model: Any, ids: torch.Tensor, taken: list[tuple[float, float]]) -> list[int]:
    found = model(ids, use_cache=True, logits_to_keep=1)
    said = []
    for step in range(STEPS):
        token = found.logits[:, -1:].argmax(-1)
        said.append(int(token))
        start, of_thread = time.perf_counter(), time.thread_time()
        found = model(token, past_key_values=found.past_key_values, use_cache=True, logits_to_keep=1)
        if step > 4:  # the first ones record
            taken.append((time.perf_counter() - start, time.thread_time() - of_thread))
    return said


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--codec", default="int4-feature")
    parser.add_argument("--weights", default="int4-group32")
    parser.add_argument("--tp", type=int, default=2)
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = asked.model or Path(folder) / "thin"
        if asked.model is None:
            save_random_llama(path, **THIN)
        model = load_engine().load(path, weights=asked.weights) if path.is_dir() else load_engine().load(path)
        seen = observe(model, [torch.arange(256)[None] % 500], tp_size=asked.tp, moments="none")
        seen.plan(asked.codec, measured=False).save(Path(folder) / "plan")
        del model
        rows = run(on_rank, asked.tp, path, Path(folder) / "plan", asked.weights)[0]
    for row in rows:
        print(*(f"{each:8.3f}" if isinstance(each, float) else f"{each:8}" for each in row.values()))
    reporting.write(asked.json, machine=machine(), model=path.name, codec=asked.codec, tp_size=asked.tp, rows=rows)


if __name__ == "__main__":
    main()
