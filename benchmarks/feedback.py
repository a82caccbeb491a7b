"""Depth feedback: the quality of codecs with it and without, the last sum's codec, and targets that are kept.

usage: python benchmarks/feedback.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N]

TEXT: as frontier.py has it. KL in nats from the uncompressed model, simulated, with its 95 % interval over sequences,
and the change of perplexity. `codecs`: "none", calibrated and served without feedback; "alike", with it, all sums in
one codec; "careful", the last sum in more bits, as plans have it. `last`: int4-feature, the last sum in other codecs.
`targets`: bits that a target took, the KL that calibration expects, and the one that is found on other text.
`make model` gets a real model for all of it.
"""

from collections.abc import Iterator
from typing import Any

import reporting
from scoring import Texts

from narrowcast import Plan
from narrowcast.calibration import Observations, observe
from narrowcast.evaluation import evaluate

CODECS = "int4-feature", "int4-group128", "int4-group32-sym"
FITTED = tuple(f"allocated(bits={bits})" for bits in (4, 3.4, 2.5))
LAST = "int4-feature", "int6-feature", "int8-feature", "int8-group128", "bf16"
TARGETS = 0.006, 0.01, 0.03
ALGORITHMS = "one_shot", "two_shot"


def found(texts: Texts, plan: Plan, algorithm: str) -> dict[str, Any]:
    scored = evaluate(texts.model, plan, texts.batches, reference=texts.reference, algorithm=algorithm)
    return {
        "algorithm": algorithm,
        "bits_per_value": scored.report.bits_per_value,
        "kl_nats": scored.score.kl_nats,
        "kl_interval": scored.score.intervals["kl_nats"],
        "top1_agreement": scored.score.top1_agreement,
        "perplexity_change": scored.score.perplexity_change,
    }


def by_codec(texts: Texts, seen: Observations) -> Iterator[dict[str, Any]]:
    for codec in (*CODECS, *FITTED):
        plans = {"none": seen.plan(codec, feedback=False), "careful": seen.plan(codec)}
        if codec in CODECS:
            plans["alike"] = seen.plan({"sum": codec, "last": codec})
        for feedback, plan in plans.items():
            for algorithm in ALGORITHMS:
                yield {"codec": codec, "feedback": feedback, **found(texts, plan, algorithm)}


def by_last(texts: Texts, seen: Observations) -> Iterator[dict[str, Any]]:
    for last in LAST:
        plan = seen.plan({"sum": "int4-feature", "last": last})
        for algorithm in ALGORITHMS:
            yield {"last": last, **found(texts, plan, algorithm)}


def by_target(texts: Texts, seen: Observations) -> Iterator[dict[str, Any]]:
    for target_kl in TARGETS:
        plan = seen.plan(f"allocated(target_kl={target_kl})")
        told = {name: plan.calibration[name] for name in ("bits", "kl_nats", "kl_nats_without_feedback")}
        yield {"target_kl": target_kl, "expected": told, **found(texts, plan, "auto")}


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, default=8)
    asked = parser.parse_args()
    texts, tables = Texts.of(asked), {}
    seen = observe(texts.model, texts.calibration, tp_size=asked.tp, moments="diagonal")
    for name, rows in (("codecs", by_codec), ("last", by_last), ("targets", by_target)):
        tables[name] = []
        for row in rows(texts, seen):
            tables[name].append(row)
            print(name, *(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), flush=True)
    reporting.write(asked.json, **texts.setting, tp_size=asked.tp, **tables)


if __name__ == "__main__":
    main()
