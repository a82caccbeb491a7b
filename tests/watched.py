"""Figures of simulated models, as Prometheus reads them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from prometheus_client import CollectorRegistry, generate_latest

import narrowcast
from narrowcast import Plan
from narrowcast.attaching import Handle
from narrowcast.monitoring import Snapshot
from narrowcast.monitoring.metrics import collector_of
from narrowcast.runtime.reports import Report

# Of those that vLLM serves the ones that narrowcast serve has, too.
COUNTERS = {"prompt_tokens", "generation_tokens", "request_success"}
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens"),
}
OF_VLLM = {
    *(f"vllm:{name}_total" for name in COUNTERS),
    *(f"vllm:{name}" for name in GAUGES),
    *(f"vllm:{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")),
}


class Watched:
    """A simulated model at work, of whose sums all are sampled, and what is scraped of it."""

    def __init__(self, model: Any, plan: Plan, handle: Handle) -> None:
        self.model, self.plan, self._handle = model, plan, handle
        self.registry = CollectorRegistry()
        self.registry.register(collector_of(self.snapshots))

    def snapshots(self) -> Iterable[Snapshot]:
        """One rank's, which counts what all ranks clip."""
        yield Snapshot.of(self.report(), self.plan, rank=0, num_ranks=1, transport="simulated")

    def report(self) -> Report:
        return self._handle.report()

    def read(self, ids: torch.Tensor) -> None:
        with torch.no_grad():
            self.model(ids, use_cache=False)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


@contextmanager
def watched(model: Any, plan: Plan) -> Iterator[Watched]:
    with narrowcast.attach(model, plan, simulate=True, sample_every=1) as handle:
        yield Watched(model, plan, handle)
