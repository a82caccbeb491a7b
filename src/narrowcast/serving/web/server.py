"""uvicorn in a thread of its own, beside the model's."""

import socket
import threading
import time
from typing import Any, Self

import uvicorn

from narrowcast.errors import NarrowcastError
from narrowcast.serving.board import Board
from narrowcast.serving.desk import Desk
from narrowcast.serving.web.app import application
from narrowcast.serving.web.metrics import metrics_of
from narrowcast.serving.web.model import Model

LINGER_S = 3.0  # after a failure, while whoever asks for the server's health learns of it
LAST_BYTES_S = 5  # for answers that clients are still reading


class Server:
    """The API of `Model(**model)` at `listener`, a bound socket, from the beginning of a `with` block to its end."""

    def __init__(self, listener: socket.socket, desk: Desk, board: Board, *, api_key: str | None, **model: Any) -> None:
        served = Model(**model)
        metrics = metrics_of(desk, board, model=served.name)
        app = application(desk, served, api_key=api_key, metrics=metrics)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=LAST_BYTES_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="server")

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not self._server.started:
            raise NarrowcastError("the web server did not start; the log says why")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            time.sleep(LINGER_S)
        self._server.should_exit = True
        self._thread.join()
