"""Quality by the amount of calibration text, and by whose it is.

usage: python benchmarks/calibration_text.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT]

TEXT: as frontier.py has it. At TP 8, simulated: KL in nats from the uncompressed model, with its 95 % interval over
sequences, of plans calibrated on the first 1, 2, 4, ... sequences.
"""

from collections.abc import Iterator
from typing import Any

import reporting
from frontier import budget, row
from scoring import Texts

from narrowcast.calibration import observe
from narrowcast.calibration.text import DEFAULT_LENGTH

TP_SIZE = 8
CASES = (
    ("int4-feature", "one_shot"),
    (budget("allocated({})", 3.0, "one_shot"), "one_shot"),
    (budget("transform(axes=site, {})", 2.0, "one_shot"), "one_shot"),
    (budget("transform(axes=ranks, {})", 1.0, "one_shot"), "one_shot"),
    (budget("transform(axes=ranks, {})", 1.3, "two_shot"), "two_shot"),
)


def rows(texts: Texts) -> Iterator[dict[str, Any]]:
    for number in (1, 2, 4, 8, 16, 32, 64):
        seen = observe(texts.model, texts.calibration[:number], tp_size=TP_SIZE, moments="full")
        for codec, algorithm in CASES:
            found = row(texts, "", codec, seen.plan(codec), algorithm, texts.model)
            yield {"num_tokens": number * DEFAULT_LENGTH, **{key: value for key, value in found.items() if value != ""}}


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    asked = parser.parse_args()
    texts, table = Texts.of(asked), []
    for found in rows(texts):
        table.append(found)
        print("{num_tokens:6} tokens  {codec:50} KL {kl_nats:.5f}".format(**found), flush=True)
    reporting.write(asked.json, **texts.setting, rows=table)


if __name__ == "__main__":
    main()
