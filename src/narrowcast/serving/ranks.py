"""Serving a model: the ranks that are started for it, and what each of them does."""

import gc
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from narrowcast.attaching import Handle, attach
from narrowcast.engines import Engine, Pages, Replicated, context_of, load_engine, vocab_size_of
from narrowcast.engines.parts import load_part
from narrowcast.engines.replication import affordable
from narrowcast.errors import NarrowcastError
from narrowcast.launch import Link, Ranks, is_first_rank, run, under_torchrun
from narrowcast.monitoring import Snapshot
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.progress import Hear, heard_by, tell
from narrowcast.runtime.reports import Report
from narrowcast.serving.board import Board
from narrowcast.serving.desk import Desk
from narrowcast.serving.job import Job, served_name, split_of
from narrowcast.serving.leading import LONGEST_BEAT_S, Leader, follow
from narrowcast.serving.listener import UNIX, bound, url_of
from narrowcast.serving.orders import Orders
from narrowcast.serving.web import import_server
from narrowcast.transport import TorchDistributedTransport, Transport

BATCH_TOKENS = 512  # of prompts and answers in a step: for so long each token waits while long prompts are read
GRACE_S = 20.0  # for requests that run when the server is stopped; torchrun ends its ranks after 30
STOPPING = "the server is being stopped"


@dataclass(frozen=True)
class Serving:
    """Told by the first rank when the server takes requests; `url`: where clients find its API."""

    name: str
    url: str


@dataclass(frozen=True)
class Ending:
    """Told by the first rank when a signal has come, and `num_left` requests are answered before the end."""

    num_left: int


def serve(job: Job, hear: Hear) -> None:
    """Serve until a signal ends it, on ranks that are started for it, or on those of torchrun, all of which call this.

    `hear` is told `Serving` and `Ending` by the first rank. SIGTERM and SIGINT let what is asked be answered, for
    `GRACE_S` seconds at most. Raises InvalidInputError before any rank is started, MissingDependencyError without what
    the web server needs, and NarrowcastError that names a rank which is lost: requests have then failed with that
    sentence.
    """
    import_server()
    split = split_of(job)
    if under_torchrun():
        with heard_by(hear):
            run(_on_rank, split.world_size, job, split, timeout_s=job.timeout_s)
        return
    if not job.host.startswith(UNIX):  # whose socket would stay
        bound(job.host, job.port).close()  # rather than found out by a rank that has loaded torch
    with ExitStack() as stack:

        def hear_too(said: object) -> None:
            if isinstance(said, Serving):  # from now on a signal is the first rank's, which ends all
                stack.enter_context(_on_signals(ranks.processes[0].terminate))
            hear(said)

        stack.enter_context(heard_by(hear_too))
        ranks = stack.enter_context(Ranks(split.world_size, timeout_s=job.timeout_s))
        ranks.run_led(_on_rank, job, split)


@contextmanager
def served(job: Job, link: Link | None = None) -> Iterator[Serving]:
    """The server, from when it takes requests to the end of the context, on ranks that are started here, on `link`.

    Ranks on a link are in network namespaces of their own: let such a job's host be a socket in the file system. Raises
    as `serve` does, and NarrowcastError in place of what a client meets where a rank has ended.
    """
    import_server()
    split = split_of(job)
    with Ranks(split.world_size, link=link, timeout_s=job.timeout_s) as ranks:
        ranks.start(_on_rank, job, split)
        serving = ranks.first_told(Serving)
        try:
            yield serving
        except NarrowcastError:
            ranks.check_alive()
            raise


def _on_rank(job: Job, split: Split) -> None:
    engine = load_engine()
    with ExitStack() as stack:
        listener = stack.enter_context(bound(job.host, job.port)) if is_first_rank() else None
        model, ranks = _loaded(engine, job, split), TorchDistributedTransport()
        plan, handle = None, None
        if job.plan is not None:
            plan = Plan.load(job.plan)
            options: dict[str, Any] = {"feedback": job.feedback, "sample_every": job.sample_every}
            handle = stack.enter_context(attach(model, plan, prompt_chunks=1, transport=job.transport, **options))
        room = {"num_tokens": job.cache_tokens, "max_requests": job.max_running, "max_batch_tokens": BATCH_TOKENS}
        pages, orders = engine.pages(model, **room), Orders(ranks, _snapshots_of(plan, handle, ranks))
        gc.collect()
        gc.freeze()  # what is loaded stays: where nobody looks at it again, a scrape of many sites takes half the time
        if listener is None:
            stack.enter_context(_on_signals(lambda: None))  # torchrun tells all ranks: the first one ends them
            follow(orders, pages)
        else:
            _lead(job, engine, model, pages, orders, listener)


def _loaded(engine: Engine, job: Job, split: Split) -> nn.Module:
    """This rank's part of the model."""
    plans = [] if job.plan is None else [Plan.load(job.plan)]
    kept: Replicated = "none" if job.replicated == "auto" else job.replicated
    if job.replicated == "auto" and plans:
        kept = affordable(engine, job.model, plans, dtype=job.dtype, weights=job.weights)
    return load_part(engine, job.model, split=split, replicated=kept, dtype=job.dtype, weights=job.weights)


def _snapshots_of(plan: Plan | None, handle: Handle | None, ranks: Transport) -> Callable[[], Snapshot]:
    """A function that tells this rank's figures: none without a plan, as the engine's own sums are not counted."""
    own = ranks.name if ranks.world_size > 1 else ""
    transport = own if handle is None else handle.transport
    empty = Snapshot.of(Report(sites={}), plan, rank=ranks.rank, num_ranks=ranks.world_size, transport=transport)
    return lambda: empty if handle is None else empty.after(handle.report())


def _lead(job: Job, engine: Engine, model: nn.Module, pages: Pages, orders: Orders, listener: socket.socket) -> None:
    """The first rank's part."""
    tokenizer = engine.load_tokenizer(job.model)
    name = job.name or served_name(job.model)
    max_len = job.max_len or min(context_of(model) or job.cache_tokens, job.cache_tokens)
    desk = Desk(max_running=job.max_running, max_waiting=job.max_waiting, max_len=max_len)
    board = Board(desk.wake)
    served = {"name": name, "tokenizer": tokenizer, "vocab_size": vocab_size_of(model), "max_len": max_len}
    server = import_server()(listener, desk, board, api_key=job.api_key, **served)

    def end() -> None:
        if desk.closed is None:
            tell(Ending(desk.num_running + desk.num_waiting))
        desk.close(STOPPING, within_s=GRACE_S)

    with server, _on_signals(end):
        tell(Serving(name, url_of(listener)))
        beat_s = min(LONGEST_BEAT_S, job.timeout_s / 4)
        Leader(desk, board, pages, orders, tokenizer, _ends(model), beat_s=beat_s).run()


def _ends(model: Any) -> set[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


@contextmanager
def _on_signals(call: Callable[[], object]) -> Iterator[None]:
    """Have SIGTERM and SIGINT do this."""
    before = {each: signal.signal(each, lambda *_: call()) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
