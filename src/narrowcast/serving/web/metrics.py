"""The answer to /metrics, in the text format of Prometheus. Whatever is counted joins in here."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from narrowcast.serving.desk import Desk


def metrics_of(desk: Desk) -> ASGIApp:
    """Gauges under vLLM's names."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        gauges = {"vllm:num_requests_running": desk.num_running, "vllm:num_requests_waiting": desk.num_waiting}
        lines = [f"# TYPE {name} gauge\n{name} {value}\n" for name, value in gauges.items()]
        await PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")(scope, receive, send)

    return answer
