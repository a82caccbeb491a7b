"""What it costs to code the hidden states between the stages of a pipeline, and nothing else.

usage: python benchmarks/boundaries.py [--json FILE] [--sequences N] [PRESET...]

The bundled model in 2 and 4 stages, simulated. Prints bits a value, KL in nats from the uncompressed model with its
standard error over sequences, and top-1 agreement, for each preset.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scoring import MODEL, Scorer, figures, text

from narrowcast.calibration import observe
from narrowcast.engines import load_engine
from narrowcast.files import check_report, write_report

PRESETS = [
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


def rows(scorer: Scorer, presets: Sequence[str]) -> Iterator[dict[str, Any]]:
    num_features = scorer.model.config.hidden_size  # type: ignore[union-attr]
    for pp_size in (2, 4):
        seen = observe(scorer.model, text("calibration.txt", NUM_CALIBRATION), pp_size=pp_size)
        base = scorer.score(seen.plan({"boundary": "bf16"}))
        for preset in presets:
            plan = seen.plan({"boundary": preset})
            site = next(iter(plan.sites.values()))
            yield {
                "pp_size": pp_size,
                "preset": preset,
                "bits_per_value": 8 * site.codecs[0].row_nbytes(num_features) / num_features,
                **figures(scorer.score(plan), base),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=PRESETS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    arguments = parser.parse_args()
    check_report(arguments.json)
    scorer = Scorer.of(load_engine().load(MODEL), text("scoring.txt", arguments.sequences))
    table = []
    print("| stages | preset | bits a value | KL, nats | top-1 |\n| ---: | --- | ---: | ---: | ---: |")
    for row in rows(scorer, arguments.presets):
        table.append(row)
        print(
            "| {pp_size} | `{preset}` | {bits_per_value:.3f} | {kl_nats:.5f} ± {standard_error:.5f} |"
            " {top1_agreement:.1%} |".format(**row),
            flush=True,
        )
    if arguments.json:
        setting = {
            "command": shlex.join(["python", *sys.argv]),
            "model": MODEL.name,
            "num_sequences": len(scorer.batches),
            "num_tokens": sum(ids.numel() for ids in scorer.batches),
        }
        write_report(arguments.json, setting | {"rows": table})


if __name__ == "__main__":
    main()
