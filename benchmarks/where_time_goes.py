"""The time of a forward on a rank by what it is spent on: the model, coding, the link, waiting, our own Python.

usage: python benchmarks/where_time_goes.py [--link RATE,DELAY ...] [--codec CODEC]
       [--json FILE] [--plot FILE.png]

Two ranks of a random Llama of 380 M parameters, each link in turn (root only; without --link, loopback). Rank 0 times
what its thread does in a prefill of 512 tokens and in decoding; of the time in which it waits for bytes, the link's
share is what they take there (delay of each exchange, payload over rate) at most, the rest is waiting: for the other
rank, or for the kernel. What travels while the rank computes is not waited for, and does not show.
Medians over rounds. The engine's own sums over gloo are timed as a whole, in the same rounds.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import reporting
import torch
import torch.distributed as dist
from torch import nn

import narrowcast
from narrowcast.attaching import Handle
from narrowcast.engines import load_engine
from narrowcast.engines.transformers.seam.embedding import Lookup
from narrowcast.launch import Link, run
from narrowcast.perf.model import VOCAB_SIZE, WEIGHTS, Job, prepared
from narrowcast.plan import Plan
from narrowcast.runtime.planned import PlannedWires
from narrowcast.runtime.products import Dense
from narrowcast.transport.tcp import TcpTransport

PARTS = "compute", "encode", "decode", "link", "waiting", "overhead"
PREFILL, DECODE, ROUNDS = 512, 16, 5


class Clock:
    """Seconds of the thread in our sums and in products there; and those of the link for what is handed over."""

    def __init__(self, link: Link | None) -> None:
        self.seconds: Counter[str] = Counter()
        self._link, self._arrival = link, 0.0
        for owner, name, part in (
            (PlannedWires, "sum_products", "ours"),
            (PlannedWires, "gather_features", "ours"),
            (Dense, "__call__", "product"),  # the model's, though they are computed inside of our sum
            (Lookup, "__call__", "product"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))
        TcpTransport.exchange = self._noted(TcpTransport.exchange)  # type: ignore[method-assign]

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed

    def _noted(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        """Note what the link needs for an exchange: it starts where the one before has left the rank."""

        def noted(transport: Any, sends: Any, recvs: Any, *, tag: int) -> Any:
            nbytes = sum(buffer.nbytes for buffer in sends if buffer is not None)
            if self._link is not None:
                now = time.perf_counter()
                left = max(self._arrival, now)
                self._arrival = left + 8 * nbytes / self._link.rate_bps
                # Chunks follow each other: the delay counts where the link had nothing to carry.
                self.seconds["link"] += self._arrival - left + (self._link.delay_s if left == now else 0.0)
            return exchange(transport, sends, recvs, tag=tag)

        return noted

    def parts(self, total_s: float, report: Counter[str]) -> dict[str, float]:
        """Milliseconds of PARTS, which add up to the total: by what was noted here and by the plan's own counters."""
        found, wire_s = self.seconds, report["exchange_s"] + report["waiting_s"]
        coding_s = report["encode_s"] + report["recode_s"], report["decode_s"]
        link_s = min(found["link"], wire_s)
        parts = {
            "compute": total_s - found["ours"] + found["product"],
            "encode": coding_s[0],
            "decode": coding_s[1],
            "link": link_s,
            "waiting": wire_s - link_s,
            "overhead": found["ours"] - found["product"] - sum(coding_s) - wire_s,
        }
        self.seconds.clear()
        return {f"{part}_ms": 1e3 * seconds for part, seconds in parts.items()}


def counted(handle: Handle) -> Counter[str]:
    """Seconds over all sites, since the plan was attached."""
    return sum((Counter(dict(site.seconds)) for site in handle.report().sites.values()), Counter())


def on_rank(job: Job, folder: Path, codec: str, link: Link | None) -> dict[str, list[dict[str, float]]]:
    model = load_engine().load(folder / WEIGHTS, split=job.split)
    plan, clock = Plan.load(folder / codec), Clock(link)
    found: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": []}
    for round_ in range(-1, ROUNDS):
        native = answer(model)
        with narrowcast.attach(model, plan, transport="tcp", timed=True) as handle:
            clock.seconds.clear()
            coded = answer(model, clock, handle)
        for phase in found if round_ >= 0 else ():
            found[phase].append({"native_ms": native[phase]["total_ms"], **coded[phase]})
    return found


@torch.no_grad()
def answer(model: nn.Module, clock: Clock | None = None, handle: Handle | None = None) -> dict[str, dict[str, float]]:
    ids, state = torch.randint(VOCAB_SIZE, (1, PREFILL), generator=torch.Generator().manual_seed(0)), None
    found = {}
    for phase, num_forwards in (("prefill", 1), ("decode", DECODE)):
        before = counted(handle) if handle else Counter()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(num_forwards):
            outputs = model(input_ids=ids, past_key_values=state, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
            ids, state = outputs.logits[:, -1:].argmax(-1), outputs.past_key_values
        total_s = time.perf_counter() - start
        figures = {"total_ms": 1e3 * total_s} | (
            clock.parts(total_s, counted(handle) - before) if clock and handle else {}
        )
        found[phase] = {name: value / num_forwards for name, value in figures.items()}
    return found


def rows(links: list[Link | None], codec: str) -> Iterator[dict[str, Any]]:
    job = Job(codecs=[codec])
    with prepared(job) as folder:
        for link in links:
            first, *_ = run(on_rank, 2, job, folder, codec, link, link=link)
            for phase, rounds in first.items():
                figures = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
                yield {"link": None if link is None else str(link), "phase": phase, "codec": codec, **figures}


def draw(table: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    colours = dict(zip(PARTS, ("#4c78a8", "#f58518", "#ffbf79", "#54a24b", "#bab0ac", "#e45756"), strict=True))
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(table)), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        own = [row for row in table if row["phase"] == phase]
        for place, row in enumerate(own):
            left = 0.0
            for part in PARTS:
                axes.barh(place, row[f"{part}_ms"], left=left, color=colours[part], label=part if not place else None)
                left += row[f"{part}_ms"]
            label = "the engine's own sums, gloo" if not place else None
            axes.plot([row["native_ms"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2, label=label)
        axes.set_yticks(range(len(own)), [row["link"] or "loopback" for row in own])
        axes.invert_yaxis()
        axes.set_xlabel("ms a prompt of 512 tokens" if phase == "prefill" else "ms a decoded token")
        axes.set_title(phase)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--link", action="append", type=Link.parse, default=[])
    parser.add_argument("--codec", default="int4-feature")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    table = []
    print("| link | phase | native ms | total ms | " + " | ".join(PARTS) + " |\n" + "| --- " * (4 + len(PARTS)) + "|")
    for row in rows([None, *arguments.link], arguments.codec):
        table.append(row)
        cells = [f"{row[name]:.2f}" for name in ("native_ms", "total_ms", *(f"{part}_ms" for part in PARTS))]
        print(f"| {row['link']} | {row['phase']} | {' | '.join(cells)} |", flush=True)
    if arguments.plot:
        draw(table, arguments.plot)
    reporting.write(arguments.json, rows=table)


if __name__ == "__main__":
    main()
