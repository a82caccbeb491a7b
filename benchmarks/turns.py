"""Time to the first token with a prompt as one forward and as halves in turns, by link, length and codec.

usage: python benchmarks/turns.py [--link RATE,DELAY ...] [--prompt N ...] [--codec CODEC ...] [--tp N] [--pp N]
                                  [--rounds N] [--json FILE]

Ranks of a random Llama of 380 M parameters, with the vocabulary on each, so that sums are all that travels; on each
link in turn (root only; "none": loopback). Transformers' own sums over gloo are timed in the same rounds. Medians.
"""

from dataclasses import replace

import reporting

from narrowcast.launch import Link
from narrowcast.perf import model as models
from narrowcast.perf.machine import machine
from narrowcast.plan.split import Split

USUAL = replace(models.DEFAULT, replicated="all", transports=("tcp",), prompt_chunks=(1, 2), decode=8)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--link", nargs="+", default=["none", "100Mbps,100us", "1Gbps,50us"], metavar="RATE,DELAY")
    parser.add_argument("--prompt", nargs="+", type=int, default=[64, 128, 256, 512], metavar="N")
    parser.add_argument("--codec", nargs="+", default=["bf16", "int4-feature"])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    job = replace(USUAL, codecs=asked.codec, split=Split(tp_size=asked.tp, pp_size=asked.pp), rounds=asked.rounds)
    rows = []
    with models.prepared(job) as folder:
        for link in asked.link:
            over = None if link == "none" else Link.parse(link)
            for prefill in asked.prompt:
                for row in models.rows(replace(job, prefill=prefill), folder, over):
                    rows.append(row)
                    print(*(f"{each:.4g}" if isinstance(each, float) else each for each in row.values()), flush=True)
                reporting.write(
                    asked.json, machine=machine(), tp_size=asked.tp, pp_size=asked.pp, rows=rows
                )  # what is there so far


if __name__ == "__main__":
    main()
