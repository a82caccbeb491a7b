"""Runs of vLLM as a user starts it, and of the ordinary environment, each in processes of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ORDINARY = HERE.parents[1] / ".venv" / "bin" / "python"
MODEL = str(HERE.parents[1] / "models" / "gutenberg-7m")
EMBEDDING = "model.embed_tokens"
LIMIT_S = 300

# Products in FP32 that are summed in another order put log-probabilities some 1e-6 apart. Where that makes a coded
# value one level more, the token, and those that attend to it, are apart by a part of what coding costs.
ROUNDING = 1e-4

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # as it asks for, for two ranks on one NUMA node
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions that record sums
}
PROMPTS = [[(7 * place + 13 * length) % 500 + 5 for place in range(length)] for length in (41, 6, 1)]


def ordinary(command: str, folder: Path, *more: str) -> None:
    """Run a part of ordinary.py."""
    if not ORDINARY.exists():
        pytest.skip(f"needs {ORDINARY}: make test-vllm prepares it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [ORDINARY, HERE / "ordinary.py", command, folder, *more], check=True, timeout=LIMIT_S, env=environment
    )


@dataclass(frozen=True)
class Run:
    """A run of serving.py that went well. `out`: its answers; recorded sums are in files beside."""

    out: Path
    log: str

    @property
    def answers(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found

    @property
    def scores(self) -> list[float]:
        return [score for each in self.answers["scores"] for score in each]


def started(folder: Path, name: str, asked: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[int, Run]:
    """The exit code of serving.py, asked for that, and what it left."""
    out = folder / f"{name}.json"
    (folder / f"{name}.asked").write_text(json.dumps({"rounds": [PROMPTS], **asked}))
    command: Sequence[Any] = [sys.executable, HERE / "serving.py", folder / f"{name}.asked", out]
    cache = {"VLLM_CACHE_ROOT": str(folder / "cache")}  # one for all runs
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(["0|1"] * asked.get("options", {}).get("pipeline_parallel_size", 1))}
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | cache | cores | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, Run(out, done.stdout)


def run(folder: Path, name: str, asked: Mapping[str, Any], **environment: str) -> Run:
    """A run that must go well."""
    code, found = started(folder, name, asked, environment)
    assert code == 0, found.log[-4000:]
    return found


@dataclass(frozen=True)
class Server:
    """`vllm serve` on two ranks, up."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """What vLLM calls its processes, by id, of those that run."""
        return running(self.process.pid)

    def worker(self, rank: int) -> int:
        """The process of a rank."""
        return next(each for each, title in self.processes().items() if f"Worker_TP{rank}" in title)

    def complete(self, prompt: str, num_tokens: int) -> tuple[int, str]:
        """Status and body of the API's answer."""
        options = {"model": "model", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        try:
            return 200, ask(f"{self.url}/v1/completions", prompt=prompt, **options)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A server with the bundled model; nothing of it is left afterwards."""
    port, log_path = free_port(), folder / "server.log"
    command = ["serve", MODEL, "--tensor-parallel-size", "2", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--enforce-eager", "--served-model-name", "model", "--port", str(port), *options]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), *command],
            env=os.environ | ENVIRONMENT | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            assert process.poll() is None, log_path.read_text()[-4000:]
            time.sleep(0.3)
        yield Server(url, process, log_path)
    finally:
        process.terminate()
        if not ended(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def running(session: int) -> dict[int, str]:
    """Command lines by process, of those of a session that run."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(each.name)) == session and (title := (each / "cmdline").read_text()):
                found[int(each.name)] = title
    return found


def ended(session: int, within_s: float = 20) -> bool:
    """True once no process of a session runs."""
    until = time.monotonic() + within_s
    while running(session) and time.monotonic() < until:
        time.sleep(0.1)
    return not running(session)


def ask(url: str, **request: Any) -> str:
    """What is answered, to a request in JSON if there is one; raises for a status other than 200."""
    body = json.dumps(request).encode() if request else None
    with urllib.request.urlopen(
        urllib.request.Request(url, body, {"content-type": "application/json"}), timeout=LIMIT_S
    ) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def answers(url: str) -> bool:
    """True if somebody does."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Between log-probabilities."""
    return [abs(mine - theirs) for mine, theirs in zip(left, right, strict=True)]


def share_alike(differences: Sequence[float]) -> float:
    """The share of those that are rounding."""
    return sum(each < ROUNDING for each in differences) / len(differences)


def simulated(served: Run, folder: Path, plan: str = "int4.plan", model: str = MODEL) -> dict[str, list[float]]:
    """Log-probabilities of what was served, by our Transformers engine."""
    answered = zip(served.answers["prompts"], served.answers["tokens"], strict=True)
    (folder / "sequences.json").write_text(json.dumps([prompt + tokens for prompt, tokens in answered]))
    ordinary("simulate", folder, model, str(folder / plan))
    found: dict[str, Any] = json.loads((folder / "simulated.json").read_text())
    lengths = [len(each) for each in served.answers["scores"]]  # of answers alone, or of prompts, too
    return {
        name: [score for each, length in zip(scores, lengths, strict=True) for score in each[-length:]]
        for name, scores in found.items()
    }
