"""The gain of each way around waiting: pieces by link, an embedding on every rank, halves in turns, sums in one call.

usage: python benchmarks/waiting.py [--link RATE,DELAY ...] [--tp N] [--codec CODEC ...] [--prompt N ...]
                                    [--batch N ...] [--layers N --hidden N --intermediate N] [--rounds N] [--json FILE]

Ranks of a random Llama on each link in turn (root only; "none": loopback), each way in turn within a round, on plans
that were tuned there first. A prompt: the engine's own sums over gloo; a plan alone, its sums in chunks; chunks only
where the link pays for them; the embedding whole on every rank, too; halves in turns, too. A decoded token, of each
batch: gloo; sums by the steps of their algorithm; small ones in one call; the embedding whole, too; and that with no
sum at all, which gives no answer, only its time. Medians, from when the last rank begins to when the last one is done.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import reporting
import torch
from torch import nn

from narrowcast import attach
from narrowcast.engines import Replicated, load_engine
from narrowcast.launch import Link, run
from narrowcast.perf import model as models
from narrowcast.perf.machine import machine
from narrowcast.perf.model import WEIGHTS, Job, Shape
from narrowcast.perf.timing import Span, over_ranks
from narrowcast.perf.tune import tune
from narrowcast.plan import Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.plan.split import Split
from narrowcast.runtime.planned import PlannedWires
from narrowcast.runtime.prompts import Chunks
from narrowcast.runtime.small_sums import SmallSums
from narrowcast.transport import connect_group

CONTEXT, TOKENS = 16, 16  # of decoding: tokens before, and those that are timed


@dataclass(frozen=True)
class Way:
    """One way to answer: what is kept whole, and how the plan is attached; `coded` by the plan, or by gloo in BF16."""

    name: str
    replicated: Replicated = "none"
    coded: bool = True
    by_link: bool = True
    prompt_chunks: Chunks = 1
    patched: Callable[[], AbstractContextManager[object]] = nullcontext


def by_steps() -> AbstractContextManager[object]:
    """No sum in one call."""
    return mock.patch.object(SmallSums, "take", lambda self, y_TE: False)


def no_sums() -> AbstractContextManager[object]:
    """Each rank goes on with what it put in."""
    return mock.patch.object(PlannedWires, "_sum", lambda self, partials, *_: partials[0].tokens(slice(None)))


PROMPT = (
    Way("gloo", coded=False),
    Way("plan alone", by_link=False),
    Way("+ pieces by link"),
    Way("+ embedding whole", "embedding"),
    Way("+ halves in turns", "embedding", prompt_chunks=2),
)
TOKEN = (
    Way("gloo", coded=False),
    Way("by steps", patched=by_steps),
    Way("in one call"),
    Way("+ embedding whole", "embedding"),
    Way("no sums", "embedding", patched=no_sums),
)


@dataclass(frozen=True)
class Case:
    """An answer to time: `batch` prompts, of which the prompt counts, or what is decoded."""

    phase: str
    batch: int
    prefill: int

    @property
    def ways(self) -> Sequence[Way]:
        return PROMPT if self.phase == "prompt" else TOKEN

    def job(self, job: Job) -> Job:
        return replace(job, batch=self.batch, prefill=self.prefill, decode=0 if self.phase == "prompt" else TOKENS)

    def spans(self, model: nn.Module, job: Job) -> Span:
        """The time of one answer."""
        prefill, decode = models.answer(model, self.job(job))
        return prefill if self.phase == "prompt" else decode


def on_rank(job: Job, folder: Path, cases: Sequence[Case]) -> dict[tuple[str, Case, str], list[Span]]:
    held = {
        each: load_engine().load(folder / WEIGHTS, split=job.split, replicated=each) for each in ("none", "embedding")
    }
    ranks = connect_group(None, transport="tcp", device=torch.device("cpu"), timeout_s=60)
    plans = {}
    for codec in job.codecs:
        plan = Plan.load(folder / codec)
        decided = tune(plan, ranks).decisions
        plans[codec] = replace(plan, decisions=Decisions(waits=decided.waits))  # coded, whatever would be faster
    found: dict[tuple[str, Case, str], list[Span]] = {}
    for round_, case in itertools.product(range(-1, job.rounds), cases):
        for codec, way in itertools.product(job.codecs, case.ways):
            if not way.coded and codec != job.codecs[0]:
                continue
            model = held[way.replicated]
            with way.patched(), at_work(model, plans[codec], way):
                span = case.spans(model, job)
            if round_ >= 0:
                found.setdefault((codec if way.coded else "bf16", case, way.name), []).append(span)
    return found


@contextmanager
def at_work(model: nn.Module, plan: Plan, way: Way) -> Iterator[None]:
    with ExitStack() as stack:
        if way.coded:
            plan = plan if way.by_link else replace(plan, decisions=Decisions())
            stack.enter_context(attach(model, plan, transport="tcp", prompt_chunks=way.prompt_chunks))
        yield


def rows(job: Job, folder: Path, link: Link | None, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    by_rank = run(on_rank, job.split.world_size, job, folder, cases, link=link)
    for codec, case, way in by_rank[0]:
        taken_s = statistics.median(over_ranks([found[codec, case, way] for found in by_rank]))
        yield {
            "link": None if link is None else str(link),
            "phase": case.phase,
            "tokens": case.prefill if case.phase == "prompt" else case.batch,
            "codec": codec,
            "way": way,
            "ms": 1e3 * taken_s / (1 if case.phase == "prompt" else TOKENS),
        }


def main() -> None:
    parser = reporting.parser(__doc__)
    links = ["none", "10Gbps,50us", "1Gbps,50us", "100Mbps,100us"]
    parser.add_argument("--link", nargs="+", default=links, metavar="RATE,DELAY")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--codec", nargs="+", default=["int4-feature", "allocated(bits=4.19)"])
    parser.add_argument("--prompt", nargs="*", type=int, default=[512, 2048], metavar="N")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8, 32], metavar="N")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4992)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    shape = Shape(hidden_size=asked.hidden, num_layers=asked.layers, intermediate_size=asked.intermediate)
    job = Job(shape=shape, codecs=asked.codec, split=Split(tp_size=asked.tp), rounds=asked.rounds)
    cases = [Case("prompt", 1, tokens) for tokens in asked.prompt] + [Case("token", n, CONTEXT) for n in asked.batch]
    found = []
    with models.prepared(job) as folder:
        for link in asked.link:
            for row in rows(job, folder, None if link == "none" else Link.parse(link), cases):
                found.append(row)
                print(*(f"{each:.4g}" if isinstance(each, float) else each for each in row.values()), flush=True)
            reporting.write(asked.json, machine=machine(), shape=str(shape), tp_size=asked.tp, rows=found)


if __name__ == "__main__":
    main()
