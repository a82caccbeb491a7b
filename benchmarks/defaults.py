"""The choices that calibration makes where nothing is said: first tokens, outliers, the guard, and how much text.

usage: python benchmarks/defaults.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N]

TEXT: as frontier.py has it. KL in nats from the uncompressed model under depth feedback, simulated, one choice after
the other changed. `make model` gets a real model for it.
"""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import reporting
from feedback import ALGORITHMS
from scoring import Texts

from narrowcast import Plan
from narrowcast.calibration import observe
from narrowcast.codecs import feature
from narrowcast.evaluation import evaluate

WAYS = "count", "choosing", "skip"
OUTLIERS = 0, 4, 9, 18, 36
CODEC, FITTED = "int4-feature", "allocated(bits=4)"
SEQUENCES = 4, 8, 16, 32


def plans(texts: Texts, tp_size: int) -> Iterator[tuple[str, Any, Plan]]:
    """What is changed, to what, and the plan of that."""
    for way in WAYS:
        seen = observe(texts.model, texts.calibration, tp_size=tp_size, first_tokens=way)  # type: ignore[arg-type]
        yield "first tokens", way, seen.plan(CODEC)
        if way == "count":
            for number in OUTLIERS:
                yield "outliers", number, seen.plan(f"feature(bits=4, outliers={number})")
            with mock.patch.object(feature, "guard_for", lambda *_: None):
                yield "guard", "none", seen.plan(CODEC)
    for number in SEQUENCES:
        if number <= len(texts.calibration):
            seen = observe(texts.model, texts.calibration[:number], tp_size=tp_size, moments="diagonal")
            for codec in (CODEC, FITTED):
                yield f"sequences, {codec}", number, seen.plan(codec)


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, default=8)
    asked = parser.parse_args()
    texts, table = Texts.of(asked), []
    for choice, value, plan in plans(texts, asked.tp):
        for algorithm in ALGORITHMS:
            score = evaluate(texts.model, plan, texts.batches, reference=texts.reference, algorithm=algorithm).score
            interval = score.intervals["kl_nats"]
            table.append(
                {
                    "choice": choice,
                    "value": value,
                    "algorithm": algorithm,
                    "kl_nats": score.kl_nats,
                    "kl_interval": interval,
                }
            )
            print(choice, value, algorithm, f"{score.kl_nats:.4f}", flush=True)
    reporting.write(asked.json, **texts.setting, tp_size=asked.tp, rows=table)


if __name__ == "__main__":
    main()
