"""The end of vLLM when a rank is lost: on all ranks at once, and with a status that says so. vLLM's own is 0."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from narrowcast.engines.vllm.settings import LOGGER, Settings
from narrowcast.errors import PeerLostError

SERVER = "vllm.entrypoints.launchers.api_server.entry"  # whose serve_http returns when the engine is dead
OURS = "narrowcast"  # an attribute of what was replaced already

logger = logging.getLogger(LOGGER)


def end_with_the_others(worker: Any) -> None:
    """Have a worker that loses others while it executes name them in a line of the log.

    vLLM's own executor hears of errors from one rank alone, and waits for it, though it be the one that is stopped. In
    a process of that executor the worker ends, which is seen at once.
    """
    whole, executor = worker.execute_model, worker.vllm_config.parallel_config.distributed_executor_backend

    @functools.wraps(whole)
    def execute_model(*args: Any, **kwargs: Any) -> Any:
        try:
            return whole(*args, **kwargs)
        except PeerLostError as error:
            logger.error("%s: vLLM ends", error)
            if executor == "mp":
                raise SystemExit(1) from error
            raise

    worker.execute_model = execute_model


def exit_with_status(on_serving: Callable[[], None]) -> None:
    """Have a server of this process, or a node without one, exit with status 1 when ranks that we serve are lost.

    A server of such ranks calls `on_serving` as it begins.
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    entry = sys.modules.get(SERVER)  # loaded by those processes alone that may serve
    server = functools.partial(_server, on_serving=on_serving)
    for owner, name, make in ((entry, "serve_http", server), (MultiprocExecutor, "start_worker_monitor", _headless)):
        whole = getattr(owner, name, None)
        if whole is not None and not hasattr(whole, OURS):
            ours = make(whole)
            setattr(ours, OURS, True)
            setattr(owner, name, ours)


def _server(serve: Any, on_serving: Callable[[], None]) -> Any:
    @functools.wraps(serve)
    async def serve_http(app: Any, *args: Any, **kwargs: Any) -> Any:
        engine, told = app.state.engine_client, []  # when the server is told to end, it ends the engine
        if engine is None or Settings.of(engine.vllm_config.additional_config) is None:
            return await serve(app, *args, **kwargs)
        on_serving()
        shutdown = engine.shutdown

        @functools.wraps(shutdown)
        def end(*args: Any, **kwargs: Any) -> None:
            told.append(True)
            shutdown(*args, **kwargs)

        engine.shutdown = end
        closing = await serve(app, *args, **kwargs)
        if told or not engine.errored:
            return closing
        await closing
        raise SystemExit(1)

    return serve_http


def _headless(watch: Any) -> Any:
    @functools.wraps(watch)
    def start_worker_monitor(executor: Any, inline: bool = False) -> None:
        served = inline and Settings.of(executor.vllm_config.additional_config) is not None
        watch(executor, inline)
        if served and executor.is_failed:
            raise SystemExit(1)

    return start_worker_monitor
