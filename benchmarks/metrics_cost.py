"""What metrics cost: answers of ranks with sampled sums and without, a scrape, and the counting of a token.

usage: python benchmarks/metrics_cost.py [--json FILE] [--every N ...] [--prompt N] [--decode N] [--rounds N] [--tp N]
                                         [--codec CODEC]

Ranks of a random Llama of 510 M parameters on loopback, where waiting hides nothing. One of N calls of each site is
sampled, going on from round to round; the ways take turns, and each is put beside the unsampled answer of its round:
the median of their ratios, less one. A rare sample does not show there, so what one of 1000 costs is also derived
from where the most are sampled. A scrape holds all ranks up while their figures are gathered, and then the first one at
most as long as Python is busy with the text.
"""

import gc
import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import reporting
from prometheus_client import CollectorRegistry, generate_latest

from narrowcast.attaching import Handle, attach
from narrowcast.launch import run
from narrowcast.monitoring import Snapshot
from narrowcast.monitoring.metrics import collector_of
from narrowcast.perf import model as models
from narrowcast.perf.machine import machine
from narrowcast.perf.timing import Span, over_ranks
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.runtime.reports import Report
from narrowcast.runtime.sampling import EVERY
from narrowcast.serving.desk import Desk
from narrowcast.serving.orders import Order, Orders
from narrowcast.serving.requests import Piece, Request, Token
from narrowcast.transport import TorchDistributedTransport

NUM_SCRAPES, NUM_TOKENS = 20, 20_000
MANY_RANKS, MANY_SITES = 8, 160  # as of a model of 80 layers
INTERVAL_S = 15  # between scrapes, as is usual
Answers = dict[int, list[models.Spans]]


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--every", nargs="+", type=int, default=[10, EVERY], metavar="N")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--codec", default="int4-feature")
    asked = parser.parse_args()
    sizes = {"prefill": asked.prompt, "decode": asked.decode, "rounds": asked.rounds}
    job = replace(models.DEFAULT, codecs=[asked.codec], split=Split(tp_size=asked.tp), replicated="all", **sizes)
    with models.prepared(job) as folder:
        by_rank = run(on_rank, job.split.world_size, job, folder, [0, *asked.every])
    rows = rows_of(job, [answers for answers, _ in by_rank])
    scrape = scrape_row([scrape for _, scrape in by_rank])
    found = {"rows": rows, "scrape": scrape, "counting_us": counting_us(), "derived": derived(rows, scrape)}
    for name, each in found.items():
        print(name, each)
    reporting.write(asked.json, machine=machine(), tp_size=asked.tp, codec=asked.codec, **sizes, **found)


def on_rank(job: models.Job, folder: Path, every: list[int]) -> tuple[Answers, dict[str, Any]]:
    """Answers by how often sums are sampled, and scrapes of the last way's figures."""
    model, plans = models.loaded(job, folder)
    (plan,) = plans.values()
    handles: dict[int, Handle] = {}
    for number in every:
        handles[number] = attach(model, plan, prompt_chunks=1, sample_every=number)
        handles[number].suspend()
    found: Answers = {number: [] for number in every}
    for round in range(-1, job.rounds):
        for number, handle in handles.items():
            handle.resume()
            spans = models.answer(model, job)
            handle.suspend()
            if round >= 0:
                found[number].append(spans)
    return found, scrapes(plan, handles[every[-1]])


def rows_of(job: models.Job, by_rank: list[Answers]) -> list[reporting.Row]:
    """A row for each way; the first one is unsampled."""
    times: dict[int, dict[str, list[float]]] = {}
    for number in by_rank[0]:
        prompts = over_ranks([[each.prefill for each in answers[number]] for answers in by_rank])
        tokens = over_ranks([[each.decode for each in answers[number]] for answers in by_rank])
        times[number] = {"prompt": prompts, "token": [each / job.decode for each in tokens]}
    rows = []
    for number, of_way in times.items():
        row: reporting.Row = {"every": number}
        for name, found in of_way.items():
            ratios = [mine / plain for mine, plain in zip(found, times[0][name], strict=True)]
            row |= {f"{name}_ms": 1e3 * statistics.median(found), f"{name}_share": statistics.median(ratios) - 1}
        rows.append(row)
    return rows


def scrapes(plan: Plan, handle: Handle) -> dict[str, Any]:
    """Spans of gathering, and on the first rank seconds of making the text, its bytes and its series."""
    ranks = TorchDistributedTransport()
    empty = Snapshot.of(Report(sites={}), plan, rank=ranks.rank, num_ranks=ranks.world_size, transport="")
    orders = Orders(ranks, lambda: empty.after(handle.report()))
    spans: list[Span] = []
    making: list[float] = []
    text = b""
    for _ in range(NUM_SCRAPES):
        if orders.leads:
            orders.give(Order(asks=True))
        else:
            orders.receive()
        start = time.perf_counter_ns()
        texts = orders.gather()
        spans.append((start, time.perf_counter_ns()))
        if orders.leads:
            text = text_of(texts)
            making.append((time.perf_counter_ns() - spans[-1][1]) / 1e9)
    found = {"gathered": spans, "making": making, "text": size_of(text)}
    if orders.leads:
        gc.collect()
        gc.freeze()  # as the server does
        many = as_of_many(texts[0])
        start_s = time.perf_counter()
        found |= {"text_of_many": size_of(text_of(many)), "making_many_s": time.perf_counter() - start_s}
    return found


def size_of(text: bytes) -> dict[str, int]:
    """Bytes and series."""
    return {"bytes": len(text), "series": sum(not line.startswith(b"#") for line in text.splitlines())}


def as_of_many(text: str) -> list[str]:
    """The snapshot of one rank as `MANY_RANKS` would have it, of `MANY_SITES` sites each."""
    one = Snapshot.from_text(text)
    sites = itertools.islice(itertools.cycle(one.report.sites.values()), MANY_SITES)
    many = one.after(replace(one.report, sites={f"site.{number}": site for number, site in enumerate(sites)}))
    return [replace(many, rank=rank, num_ranks=MANY_RANKS).to_text() for rank in range(MANY_RANKS)]


def text_of(texts: list[str]) -> bytes:
    """As the server makes it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector_of(lambda: map(Snapshot.from_text, texts)))
    return generate_latest(registry)


def scrape_row(by_rank: list[dict[str, Any]]) -> reporting.Row:
    """Medians of all scrapes, and one of `MANY_RANKS`."""
    first = by_rank[0]
    gathered = over_ranks([found["gathered"] for found in by_rank])
    return {
        "gather_ms": 1e3 * statistics.median(gathered),
        "text_ms": 1e3 * statistics.median(first["making"]),
        **first["text"],
        "text_of_many_ms": 1e3 * first["making_many_s"],
        **{f"{name}_of_many": size for name, size in first["text_of_many"].items()},
    }


def counting_us() -> float:
    """Of a token that is said, the hearing of it by nobody included."""
    desk = Desk(max_running=1, max_waiting=0, max_len=NUM_TOKENS)
    (name,) = desk.hand_in([(Request(prompt=(1,), max_new_tokens=NUM_TOKENS), lambda _: None)])
    desk.next()
    piece = Piece(tokens=[Token(1)])
    start = time.perf_counter()
    for _ in itertools.repeat(None, NUM_TOKENS):
        desk.say(name, piece)
    return 1e6 * (time.perf_counter() - start) / NUM_TOKENS


def derived(rows: list[reporting.Row], scrape: reporting.Row) -> reporting.Row:
    """Shares of a prompt's and a token's time that one sample of `EVERY` takes, and of all time that scrapes do."""
    most = min((row for row in rows if row["every"]), key=lambda row: row["every"])
    shares = {name: most[name] * most["every"] / EVERY for name in ("prompt_share", "token_share")}
    return {**shares, "scrape_share": (scrape["gather_ms"] + scrape["text_ms"]) / 1e3 / INTERVAL_S}


if __name__ == "__main__":
    main()
