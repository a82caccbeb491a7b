"""The cost of coding the hidden states between the stages of a pipeline, and nothing else.

usage: python benchmarks/boundaries.py [--json FILE] [--sequences N] [CODEC...]

The bundled model in 2 and 4 stages, simulated. Prints bits a value, KL in nats from the uncompressed model with its
standard error over sequences, and top-1 agreement, for each codec.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import reporting
from scoring import MODEL, Scorer, figures, setting_of, text

from narrowcast.calibration import observe
from narrowcast.engines import load_engine

CODECS = [
    "bf16",
    "int8-feature",
    "int6-feature",
    "int4-feature",
    "int8-group128",
    "group(bits=6, size=128)",
    "int4-group128",
    "group(bits=4, size=32)",
    "fp8",
    "minifloat(element=e4m3, scale=e8m0, size=32)",
    "mxfp4",
    "nvfp4",
]
NUM_CALIBRATION = 64


def rows(scorer: Scorer, codecs: Sequence[str]) -> Iterator[dict[str, Any]]:
    num_features = scorer.model.config.hidden_size  # type: ignore[union-attr]
    for pp_size in (2, 4):
        seen = observe(scorer.model, text("calibration.txt", NUM_CALIBRATION), pp_size=pp_size)
        base = scorer.score(seen.plan({"boundary": "bf16"}))
        for codec in codecs:
            plan = seen.plan({"boundary": codec})
            site = next(iter(plan.sites.values()))
            yield {
                "pp_size": pp_size,
                "codec": codec,
                "bits_per_value": 8 * site.codecs[0].row_nbytes(num_features) / num_features,
                **figures(scorer.score(plan), base),
            }


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("codecs", nargs="*", metavar="CODEC", default=CODECS)
    parser.add_argument("--sequences", type=int, default=32)
    arguments = parser.parse_args()
    scorer = Scorer.of(load_engine().load(MODEL), text("scoring.txt", arguments.sequences))
    table = []
    print("| stages | codec | bits a value | KL, nats | top-1 |\n| ---: | --- | ---: | ---: | ---: |")
    for row in rows(scorer, arguments.codecs):
        table.append(row)
        print(
            "| {pp_size} | `{codec}` | {bits_per_value:.3f} | {kl_nats:.5f} ± {standard_error:.5f} |"
            " {top1_agreement:.1%} |".format(**row),
            flush=True,
        )
    reporting.write(arguments.json, **setting_of(scorer.batches), rows=table)


if __name__ == "__main__":
    main()
