"""The costs of depth feedback: in the kernel that encodes, against copying; and in the answers of a split model.

usage: python benchmarks/feedback_costs.py [--json FILE] [--link LINK ...]     (links want root)

`kernels`: median microseconds for 512 x 4096 values in BF16 on one thread: to encode, to encode with a residue in FP32
that is read and written, and to copy as many bytes as that reads and writes. `answers`: as `narrowcast bench model` has
them, with feedback and without, in interleaved rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import reporting
import torch

from narrowcast import Plan
from narrowcast.codecs import Ranges, recipe
from narrowcast.launch import Link
from narrowcast.perf.model import Job, prepared, rows

CODECS = "int4-feature", "int4-group32-sym", "allocated"
SHAPE = 512, 4096
NUM_TIMED = 60
OF_ANSWERS, WITHOUT = "int4-feature", "int4-feature without feedback"


def microseconds(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of turns, one after the other."""
    spans: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(NUM_TIMED):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            spans[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(each) for name, each in spans.items()}


def kernel(name: str) -> dict[str, Any]:
    x_TE = torch.randn(*SHAPE).bfloat16()
    codec = recipe(name).codec(Ranges.of(x_TE[None].float()))
    payload_TB, residue_TE = codec.encode(x_TE, source=0), torch.zeros(*SHAPE)
    nbytes = x_TE.nbytes + payload_TB.nbytes + 2 * residue_TE.nbytes
    there, here = torch.zeros(nbytes // 2, dtype=torch.uint8), torch.ones(nbytes // 2, dtype=torch.uint8)
    work = {
        "encode_us": lambda: codec.encode(x_TE, source=0, out=payload_TB),
        "with_residue_us": lambda: codec.encode(x_TE, source=0, out=payload_TB, residue=residue_TE),
        "copy_us": lambda: there.copy_(here),
    }
    return {"codec": name, **microseconds(work)}


def answers(links: list[str]) -> Iterator[dict[str, Any]]:
    job = Job(codecs=(OF_ANSWERS,), rounds=5)
    with prepared(job) as folder:
        plan = Plan.load(folder / OF_ANSWERS)
        replace(plan, feedback=plan.feedback.turned_off()).save(folder / WITHOUT)
        for link in links or [""]:
            yield from rows(replace(job, codecs=(OF_ANSWERS, WITHOUT)), folder, Link.parse(link) if link else None)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--link", action="append", default=[], metavar="RATE,LATENCY")
    asked = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {"kernels": [], "answers": []}
    torch.set_num_threads(1)
    for name, found in (("kernels", map(kernel, CODECS)), ("answers", answers(asked.link))):
        for row in found:
            tables[name].append(row)
            print(name, *(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), flush=True)
    reporting.write(asked.json, shape=SHAPE, **tables)


if __name__ == "__main__":
    main()
