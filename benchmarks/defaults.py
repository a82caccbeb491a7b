"""The choices that calibration makes where nothing is said: first tokens, outliers, the guard, and how much text.

usage: python benchmarks/defaults.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N]
                                     [--choice CHOICE ...]

TEXT: as frontier.py has it. KL in nats from the uncompressed model under depth feedback, simulated, one choice after
the other changed. `make model` gets a real model for it.
"""

from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

import reporting
from feedback import ALGORITHMS
from scoring import Texts

from narrowcast import Plan
from narrowcast.calibration import Observations, observe
from narrowcast.codecs import feature
from narrowcast.evaluation import evaluate

CHOICES = "first tokens", "first tokens, fitted", "outliers", "guard", "sequences"
WAYS = "count", "choosing", "skip"
OUTLIERS = 0, 4, 9, 18, 36
CODEC, FITTED = "int4-feature", "allocated(bits=4)"
SEQUENCES = 4, 8, 16, 32


def plans(texts: Texts, tp_size: int, choices: Collection[str]) -> Iterator[tuple[str, Any, Plan]]:
    """What is changed, to what, and the plan of that."""

    def seen(number: int | None = None, **options: Any) -> Observations:
        return observe(texts.model, texts.calibration[:number], tp_size=tp_size, **options)

    if "first tokens" in choices:
        for way in WAYS:
            yield "first tokens", way, seen(first_tokens=way).plan(CODEC, measured=False)
    if "first tokens, fitted" in choices:
        for way in ("count", "skip"):
            plan = seen(first_tokens=way, moments="diagonal").plan(FITTED, measured=False)
            yield f"first tokens, {FITTED}", way, plan
    if "outliers" in choices:
        counted = seen()
        for number in OUTLIERS:
            yield "outliers", number, counted.plan(f"feature(bits=4, outliers={number})", measured=False)
    if "guard" in choices:
        with mock.patch.object(feature, "guard_for", lambda *_: None):
            yield "guard", "none", seen().plan(CODEC, measured=False)
    if "sequences" in choices:
        for number in SEQUENCES:
            if number <= len(texts.calibration):
                of_some = seen(number, moments="diagonal")
                for codec in (CODEC, FITTED):
                    yield f"sequences, {codec}", number, of_some.plan(codec, measured=False)


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--choice", nargs="+", choices=CHOICES, default=CHOICES, metavar="CHOICE")
    asked = parser.parse_args()
    texts, table = Texts.of(asked), []
    for choice, value, plan in plans(texts, asked.tp, asked.choice):
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
