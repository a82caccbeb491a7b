"""Servers of tests: processes of their own, at ports that the system gives."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest.mock import patch

import httpx2
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from commands import run
from narrowcast import cli
from narrowcast.serving import served

LIMIT_S = 90


class Scrape:
    """What /metrics said."""

    def __init__(self, text: str) -> None:
        self.text, self.families = text, list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all series of that name with these labels, of which there is one at least."""
        found = [each for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        assert found, f"no {name} with {labels}"
        return sum(each.value for each in found)

    def labels(self, name: str, label: str) -> set[str]:
        """Values of a label."""
        return {each.labels[label] for each in self.samples if each.name == name}


class Served:
    """A server that takes requests from the beginning of a `with` block to its end."""

    model: str
    url: str

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.removeprefix("http://").removesuffix("/v1")

    def client(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=api_key, max_retries=0, timeout=LIMIT_S)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url.removesuffix("/v1") + path, timeout=LIMIT_S)

    def scrape(self) -> Scrape:
        answer = self.get("/metrics")
        assert answer.status_code == 200
        return Scrape(answer.text)

    def num_running(self) -> int:
        """Requests with the model, and those before it."""
        found = self.scrape()
        return int(found.value("vllm:num_requests_running") + found.value("vllm:num_requests_waiting"))

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while self.num_running():
            assert time.monotonic() < deadline, "nobody asks any more, and places are still taken"
            time.sleep(0.05)


class Server(Served):
    """`narrowcast serve` with these arguments, whose ranks this process starts: it has imported all that they need."""

    def __init__(self, *arguments: object) -> None:
        with patch.object(cli.serve, "serve_job") as begun:
            run("serve", *arguments, "--port", 0)
        (self.job, _) = begun.call_args.args
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        serving = self._stack.enter_context(served(self.job))
        self.model, self.url = serving.name, serving.url
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()


class Command(Served):
    """`narrowcast serve` with these arguments in a process of its own, which takes seconds to import all that."""

    def __init__(self, *arguments: object, launcher: tuple[str, ...] = ("-m", "narrowcast")) -> None:
        command = [sys.executable, *launcher, "serve", *map(str, arguments), "--port", "0"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings
        )

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.fullmatch(r"serving (\S+) at (http://\S+/v1); Ctrl-C ends it\n", said)
        if found is None:
            self.process.kill()
            raise AssertionError(said + self.process.communicate()[1])
        self.model, self.url = found.groups()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def ranks(self) -> list[int]:
        """The processes that are its ranks, in their order: all that its server of forks has started."""
        (forking,) = [child for child in children(self.process.pid) if children(child)]
        return sorted(children(forking))

    def ended(self) -> tuple[int, str]:
        """Its exit status, and what it says of errors."""
        self.last_words, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, errors


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in found for child in each.read_text().split()]


class Proxy:
    """A server between clients and the one at `url`, in a `with` block.

    Each line that the model says takes it `delay_s`. `answers`: its own ones, as a status and a text, by what a
    request's path, a space and its body contain.
    """

    def __init__(self, url: str, *, delay_s: float = 0.0, answers: dict[str, tuple[int, str]] | None = None) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Between)
        self._server.daemon_threads = True
        self._server.between = url.removesuffix("/v1"), delay_s, answers or {}  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Between(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        url, delay_s, answers = self.server.between  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = f"{self.path} {body.decode()}"
        for part, (status, text) in answers.items():
            if part in asked:
                self._begin(status)
                self.wfile.write(text.encode())
                return
        headers = {name: self.headers[name] for name in ("Content-Type", "Authorization") if name in self.headers}
        request = urllib.request.Request(url + self.path, body or None, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                self._begin(answer.status)
                for line in answer:
                    time.sleep(delay_s if body else 0)
                    self.wfile.write(line)
        except urllib.error.HTTPError as error:
            self._begin(error.code)
            self.wfile.write(error.read())

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
