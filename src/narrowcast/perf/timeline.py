"""Where the time of an answer goes, rank by rank, as a trace that chrome://tracing and https://ui.perfetto.dev show."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from narrowcast.attaching import attach
from narrowcast.collectives.clock import Span
from narrowcast.launch import Link, run
from narrowcast.perf import model as models
from narrowcast.perf.model import Job, Way
from narrowcast.runtime.prompts import Chunks

NUM_DECODED = 4  # tokens after the prompt's
COMPUTE = "compute"
PROMPTS: Mapping[Chunks, str] = {1: "one forward", 2: "halves in turns", "auto": "as tuned"}

Event = dict[str, Any]


@dataclass(frozen=True)
class Timeline:
    """One answer on a rank: its forwards by name, start and end in seconds, and what was not computing in them."""

    forwards: Sequence[tuple[str, float, float]]
    spans: Sequence[Span]

    def events(self, rank: int, thread: int, origin_s: float) -> Iterator[Event]:
        """Events of a trace that begins at `origin_s`; what is in between is computing."""
        for name, start_s, end_s in self.forwards:
            yield _event(name, "forward", start_s, end_s, rank, thread, origin_s)
            reached_s = start_s
            for span in (each for each in self.spans if start_s <= each.start_s < end_s):
                yield _event(COMPUTE, COMPUTE, reached_s, span.start_s, rank, thread, origin_s)
                yield _event(f"{span.part} {span.site}", span.part, span.start_s, span.end_s, rank, thread, origin_s)
                reached_s = span.end_s
            yield _event(COMPUTE, COMPUTE, reached_s, end_s, rank, thread, origin_s)


def trace(job: Job, folder: Path, links: Sequence[Link | None]) -> dict[str, Any]:
    """A Chrome trace: a process for each rank, a thread for each link and way, which all begin at zero."""
    events: list[Event] = []
    threads = itertools.count()
    for link in links:
        by_rank = run(_on_rank, job.split.world_size, job, folder, link=link, timeout_s=job.timeout_s)
        for way in by_rank[0]:
            thread, timelines = next(threads), [found[way] for found in by_rank]
            origin_s = min(each.forwards[0][1] for each in timelines)
            for rank, timeline in enumerate(timelines):
                name = f"{link or 'loopback'}, {way.codec}, {PROMPTS[way.prompt_chunks]}"
                events += [_named("process_name", f"rank {rank}", rank, 0), _named("thread_name", name, rank, thread)]
                events += timeline.events(rank, thread, origin_s)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _on_rank(job: Job, folder: Path) -> Mapping[Way, Timeline]:
    model, plans, few = *models.loaded(job, folder), replace(job, decode=NUM_DECODED)
    found = {}
    for way in models.ways(job):
        with attach(model, plans[way.codec], timed=True, **way.options) as handle:
            models.answer(model, few)  # warms up
            spans = handle.trace()
            prefill, decode = models.answer(model, few)
        forwards = [(f"prompt of {job.prefill}", prefill), (f"{NUM_DECODED} tokens", decode)]
        found[way] = Timeline([(name, start / 1e9, end / 1e9) for name, (start, end) in forwards], list(spans))
    return found


def _event(name: str, category: str, start_s: float, end_s: float, rank: int, thread: int, origin_s: float) -> Event:
    """See "Trace Event Format": a complete event; microseconds."""
    times = {"ts": (start_s - origin_s) * 1e6, "dur": (end_s - start_s) * 1e6}
    return {"name": name, "cat": category, "ph": "X", "pid": rank, "tid": thread, **times}


def _named(what: str, name: str, rank: int, thread: int) -> Event:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
