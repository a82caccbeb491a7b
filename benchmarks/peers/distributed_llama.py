"""Answers by distributed-llama: it is the root on the first of our ranks, and a worker on each other one."""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from peers.answer import Answer, Place, sent_bytes
from peers.distributed_llama_files import prompt

from narrowcast.errors import NarrowcastError
from narrowcast.perf.model import Job
from narrowcast.transport.address import listen, own_address

PROGRAM = "dllama"
WEIGHTS = "Q40"
SYNC = "q80"  # what sums travel in: there is nothing else for weights in Q40
BOUND_TO_PARENT = "setpriv", "--pdeathsig", "KILL"
LISTENING = "0A"  # of a socket, in /proc/net/tcp
LISTENS_WITHIN_S = 30
TOKEN = "🔶 Pred"  # begins the line of each
MEAN_MS = re.compile(r"^(Evaluation|Prediction)\n[^()]*\((\d+\.\d+) ms/tok\)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The program of a checkout, and a model."""

    program: Path
    model: Path
    tokenizer: Path


def answer(files: Files, job: Job, place: Place) -> Answer:
    """The answer at `place`, by its own account; what its nodes send is counted from the first token on."""
    with place.ranks() as ranks:
        found: Answer = ranks.run(_on_rank, files, job, place.num_threads)[0]
    return found


def mean_ms(said: str) -> dict[str, float]:
    """Milliseconds of a token in the Evaluation of the prompt and in the Prediction, from what it said in all."""
    return {name: float(figure) for name, figure in MEAN_MS.findall(said)}


def _on_rank(files: Files, job: Job, num_threads: int) -> Answer | None:
    """The answer, on the first rank."""
    if dist.get_rank() == 0:
        return _as_root(files, job, num_threads)
    address = own_address(None)
    with listen(address) as found:
        port = found.getsockname()[1]
    options = ["--host", address, "--port", str(port), "--nthreads", str(num_threads)]
    with _running([str(files.program), "worker", *options], subprocess.DEVNULL) as worker:
        _await_listener(port, worker)
        _meet(f"{address}:{port}")
        dist.barrier()  # the root is done
    return None


def _as_root(files: Files, job: Job, num_threads: int) -> Answer:
    addresses, processes = zip(*_meet(""), strict=True)
    length = str(job.prefill + job.decode)
    options = ["--model", str(files.model), "--tokenizer", str(files.tokenizer), "--buffer-float-type", SYNC]
    options += ["--nthreads", str(num_threads), "--max-seq-len", length, "--steps", length, "--temperature", "0"]
    options += ["--prompt", prompt(job.prefill + 1)]  # the last of which it counts as the first that it decodes
    options += ["--workers", *addresses[1:]] if len(addresses) > 1 else []
    said, sent = [], []
    with _running([str(files.program), "inference", *options], subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith(TOKEN):
                sent.append(sent_bytes(processes))
    told = mean_ms("".join(said))
    if len(sent) != job.decode or len(told) != 2:
        raise NarrowcastError(f"distributed-llama gave no answer; it ended with: {''.join(said[-3:]).strip()}")
    dist.barrier()
    return Answer(
        prompt_s=told["Evaluation"] * job.prefill / 1e3,
        ms_per_token=told["Prediction"],
        bytes_per_token=(sent[-1] - sent[0]) / (len(sent) - 1) / len(processes),
    )


def _meet(address: str) -> Sequence[tuple[str, int]]:
    """The address of each node, and the process of its rank, once all workers listen."""
    found: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(found, (address, os.getpid()))
    return found


def _await_listener(port: int, worker: subprocess.Popen[str]) -> None:
    """Wait for a worker without connecting, which it would take for its root."""
    deadline = time.monotonic() + LISTENS_WITHIN_S
    while worker.poll() is None and time.monotonic() < deadline:
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENING and int(local.split(":")[1], 16) == port:
                return
        time.sleep(0.01)
    raise NarrowcastError(f"no worker of distributed-llama listens on port {port}")


@contextmanager
def _running(command: Sequence[str], stdout: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*BOUND_TO_PARENT, *command], stdout=stdout, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
