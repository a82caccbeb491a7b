"""Depth feedback: the quality of codecs with it and without.

usage: python benchmarks/feedback.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N]

TEXT: as frontier.py has it. KL in nats from the uncompressed model, simulated, with its 95 % interval over sequences,
and the change of perplexity. `make model` gets a real model for it.
"""

from collections.abc import Iterator
from typing import Any

import reporting
from scoring import Texts

from narrowcast.calibration import observe
from narrowcast.evaluation import evaluate

CODECS = "int4-feature", "int4-group128", "int4-group32-sym"
ALGORITHMS = "one_shot", "two_shot"


def rows(texts: Texts, tp_size: int) -> Iterator[dict[str, Any]]:
    seen = observe(texts.model, texts.calibration, tp_size=tp_size)
    for codec in CODECS:
        plan = seen.plan(codec)
        for algorithm in ALGORITHMS:
            for feedback in (False, True):
                options: dict[str, Any] = {"algorithm": algorithm, "feedback": feedback}
                found = evaluate(texts.model, plan, texts.batches, reference=texts.reference, **options)
                yield {
                    "codec": codec,
                    **options,
                    "bits_per_value": found.report.bits_per_value,
                    "kl_nats": found.score.kl_nats,
                    "kl_interval": found.score.intervals["kl_nats"],
                    "perplexity_change": found.score.perplexity_change,
                }


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, default=8)
    asked = parser.parse_args()
    texts, table = Texts.of(asked), []
    for found in rows(texts, asked.tp):
        table.append(found)
        print("{codec:18} {algorithm} feedback {feedback!s:5} KL {kl_nats:.4f}".format(**found), flush=True)
    reporting.write(asked.json, **texts.setting, tp_size=asked.tp, rows=table)


if __name__ == "__main__":
    main()
