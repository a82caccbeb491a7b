"""The answer to /metrics: requests under vLLM's names and with its meanings, and figures of the ranks.

Names and meanings: docs/monitoring.md.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from narrowcast.monitoring.metrics import add_histogram, collector_of
from narrowcast.serving.board import Board
from narrowcast.serving.desk import Desk

HISTOGRAMS = {
    "time_to_first_token_seconds": ("first_token", "From a request's coming to its first token."),
    "inter_token_latency_seconds": ("next_token", "From one token of an answer to the next."),
    "e2e_request_latency_seconds": ("whole", "From a request's coming to its end."),
    "request_queue_time_seconds": ("queue", "From a request's coming until it runs."),
    "request_prefill_time_seconds": ("prefill", "From when a request runs to its first token."),
    "request_decode_time_seconds": ("decode", "From the first token of an answer to its last one."),
    "request_prompt_tokens": ("prompt_tokens", "Tokens of the prompts of requests that were answered."),
    "request_generation_tokens": ("answer_tokens", "Tokens of their answers."),
}
LABELS = "model_name", "engine"
ENGINE = "0"  # vLLM may have several
FULL = "max_num_queued_reqs"  # vLLM's name of the limit


def metrics_of(desk: Desk, board: Board, *, model: str) -> ASGIApp:
    """The figures of `desk`, under the name of the model that it serves, and those of the ranks on `board`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector_of(board.snapshots))  # first, as it waits for a step
    registry.register(_Requests(desk, board, model))

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        encode, media_type = choose_encoder(Request(scope).headers.get("accept", ""))
        text = await run_in_threadpool(encode, registry)
        await Response(text, media_type=media_type)(scope, receive, send)

    return answer


class _Requests(Collector):
    def __init__(self, desk: Desk, board: Board, model: str) -> None:
        self._desk, self._board, self._model = desk, board, model

    def collect(self) -> Iterator[Metric]:
        figures, labels = self._desk.figures(), [self._model, ENGINE]
        single = (
            (GaugeMetricFamily, "num_requests_running", self._desk.num_running, "Requests with the model."),
            (GaugeMetricFamily, "num_requests_waiting", self._desk.num_waiting, "Requests before it."),
            (GaugeMetricFamily, "kv_cache_usage_perc", self._board.usage, "The share of the cache that requests use."),
            (CounterMetricFamily, "prompt_tokens", figures.num_read, "Tokens of prompts that were read."),
            (CounterMetricFamily, "generation_tokens", figures.num_said, "Tokens of answers."),
        )
        for kind, name, number, about in single:
            family = kind(f"vllm:{name}", about, labels=LABELS)
            family.add_metric(labels, number)
            yield family
        ended = _counter("request_success", "Requests that ended, by what ended them.", *LABELS, "finished_reason")
        for ending, number in figures.endings.items():
            ended.add_metric([*labels, ending], number)
        refused = _counter("admission_rejections", "Bodies that were refused with 429.", LABELS[0], "reason")
        refused.add_metric([self._model, FULL], figures.num_refused)
        yield from (ended, refused)
        for name, (field, about) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", about, labels=LABELS)
            add_histogram(histogram, labels, getattr(figures, field))
            yield histogram


def _counter(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"vllm:{name}", about, labels=labels)
