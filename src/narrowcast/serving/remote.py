"""A server of OpenAI's API as its clients ask it: plain HTTP, over TCP or over a socket in the file system."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.serving.listener import UNIX


def is_url(where: str) -> bool:
    """True for a server's address, false for a model's folder, file or name."""
    return where.startswith(("http://", "https://"))


class AnswerError(NarrowcastError):
    """An answer that is an error, in the server's words. `status`: HTTP's, or None in the middle of a stream."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """The server at `url`, with or without its /v1, or of `unix:PATH`; it may be silent for `timeout_s`, or for ever.

    What is asked raises AnswerError where the answer is an error, and InvalidInputError where there is no such server.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._base, self._opener = self.url, urllib.request.build_opener()
        if self.url.startswith(UNIX):
            no_proxy = urllib.request.ProxyHandler({})
            self._base = "http://localhost"
            self._opener = urllib.request.build_opener(no_proxy, _OverSocket(self.url.removeprefix(UNIX)))

    def text(self, path: str) -> str:
        """All that is found there."""
        with self.lines(path) as lines:
            return "".join(lines)

    def json(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer as JSON values."""
        with self.lines(path, body) as lines:
            return json.loads("".join(lines))

    @contextmanager
    def events(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The chunks of a streamed answer; who stops reading them hangs up."""
        with self.lines(path, {**body, "stream": True}) as lines:
            yield _chunks(lines)

    @contextmanager
    def lines(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Iterator[str]]:
        """The lines of an answer; who stops reading them hangs up."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._base + path, data, self._headers)
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                yield (line.decode() for line in answer)
        except urllib.error.HTTPError as error:
            raise AnswerError(f"{self.url}{path}: {_message(error)}", error.code) from error
        except (OSError, ValueError, HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            raise InvalidInputError(
                self.url, expected="a server of OpenAI's API", found=reason, remedy="Start narrowcast serve, say."
            ) from error


def _chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        name, _, data = line.strip().partition(": ")
        if name != "data" or data == "[DONE]":
            continue
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise AnswerError(chunk["error"]["message"])
        yield chunk


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


class _OverSocket(urllib.request.HTTPHandler):
    """HTTP over the socket at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(lambda host, **settings: _SocketConnection(host, self._path, **settings), req)


class _SocketConnection(HTTPConnection):
    def __init__(self, host: str, path: str, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
