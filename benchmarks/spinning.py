"""What threads of PyTorch cost that spin while they wait for one another, where cores are busy otherwise.

usage: python benchmarks/spinning.py [--busy N ...] [--rounds N] [--json FILE]

Each way of waiting of GNU OpenMP, in a process of its own and in turns: seconds to calibrate the bundled model (8
sequences, 4 ranks, 4 bits), and us for one product of a vector with a 2048 x 2048 matrix in BF16; beside
N processes that compute all the time. Medians.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

import reporting
from scoring import MODEL

from narrowcast.perf.machine import machine

WAYS = {
    "300000 spins (GNU's)": {"GOMP_SPINCOUNT": "300000"},
    "1000 spins (narrowcast)": {"GOMP_SPINCOUNT": "1000"},
    "none": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WORK = f"""
import json, pathlib, time
import narrowcast, torch
from narrowcast.calibration.text import sequences
from narrowcast.engines import load_engine
engine, folder = load_engine(), pathlib.Path("{MODEL}")
text = sequences(engine.load_tokenizer(folder), folder / "calibration.txt", length=256, limit=8)
model = engine.load(folder)
start = time.perf_counter()
narrowcast.calibrate(model, text, tp_size=4, codec="allocated(bits=4)")
calibrated = time.perf_counter()
x, weight = torch.ones(1, 2048).bfloat16(), torch.ones(2048, 2048).bfloat16()
for _ in range(1000):
    torch.nn.functional.linear(x, weight)
print(json.dumps([calibrated - start, (time.perf_counter() - calibrated) * 1e3]))
"""
BUSY = "while True: pass"


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[tuple[int, str], list[list[float]]] = {}
    for _, (others, way) in itertools.product(range(asked.rounds), itertools.product(asked.busy, WAYS)):
        with ExitStack() as stack:
            for _ in range(others):
                stack.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
            settings = {**os.environ, "HF_HUB_OFFLINE": "1", **WAYS[way]}
            said = subprocess.check_output([sys.executable, "-c", WORK], env=settings, text=True)
        found.setdefault((others, way), []).append(json.loads(said))
    rows = []
    for (others, way), each in found.items():
        calibrate_s, product_us = map(statistics.median, zip(*each, strict=True))
        rows.append({"busy": others, "way": way, "calibrate_s": calibrate_s, "product_us": product_us})
        print(others, f"{way:24}", f"{calibrate_s:8.1f} s {product_us:8.0f} us")
    reporting.write(asked.json, machine=machine(), rounds=asked.rounds, rows=rows)


if __name__ == "__main__":
    main()
