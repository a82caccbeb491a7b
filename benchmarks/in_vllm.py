"""A model served by vLLM on several nodes, by its own sums and as a plan says: `vllm bench serve`, bytes on the wire.

usage: python benchmarks/in_vllm.py --vllm PYTHON [--link RATE,DELAY ...] [--rounds N] [--prompts N] [--prompt N]
       [--decode N] [--at-once N] [--nodes N] [--layers N --hidden N --intermediate N] [--codec CODEC] [--eager]
       [--json FILE] [--model FOLDER [--calibrate TEXT] [--plan PLAN]]

PYTHON: that of an environment with vLLM and narrowcast (make test-vllm makes .venv-vllm). A random Llama, or the model
of FOLDER, on nodes of one thread each, on every link in turn (root only; "none": loopback). Two servers are up at once,
one with NARROWCAST_PLAN and NARROWCAST_TUNE, one without, and answer in turns, one request at a time, then several at
once; medians. The plan is made of TEXT (as frontier.py has it; by default FOLDER/calibration.txt), or is PLAN, for as
many nodes.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import reporting
import torch.distributed as dist
from peers.distributed_llama import BOUND_TO_PARENT
from scoring import planned
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from narrowcast.aligned import aligned
from narrowcast.errors import NarrowcastError
from narrowcast.launch import Link, Ranks
from narrowcast.launch.emulation import DEVICE
from narrowcast.perf import model as perf
from narrowcast.perf.machine import machine
from narrowcast.perf.model import VOCAB_SIZE, WEIGHTS, Job, Shape
from narrowcast.plan.split import Split
from narrowcast.transport.address import own_address

BENCH = Path(__file__).parent / "peers" / "bench_vllm.py"
WAYS = PLANNED, OWN = "narrowcast", "vLLM's own"
SAYS = "ranks.py"  # as vLLM's log has it
NO_LINK = "none"
LIMIT_S = 1800
KV_CACHE_NBYTES = 1 << 28  # there are the ranks of two servers at once in this machine's memory
TOLD = 3000  # characters of a log
OF_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NARROWCAST_PLAN",
    "NARROWCAST_CODEC",
    "NARROWCAST_TUNE",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
VERSION = "import importlib.metadata as m; print(m.version('vllm'))"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a node needs to know; `folder` takes logs and what vLLM compiles."""

    python: Path
    folder: Path
    model: Path
    plan: Path
    eager: bool
    prompt: int
    decode: int
    prompts: int
    rounds: int
    at_once: int

    @property
    def max_model_len(self) -> int:
        """Twice what is asked for, as vLLM refuses long texts by their letters, too, but no more than the model has."""
        config = json.loads((self.model / "config.json").read_text(encoding="utf8"))
        return min(2 * (self.prompt + self.decode), int(config["max_position_embeddings"]))


@contextmanager
def prepared(asked: argparse.Namespace, shape: Shape) -> Iterator[tuple[Path, Path, Path]]:
    """A folder, a model and a plan for it, kept as long as the context."""
    if asked.model is None:
        with perf.prepared(Job(shape=shape, codecs=[asked.codec], split=Split(tp_size=asked.nodes))) as folder:
            write_tokenizer(folder / WEIGHTS)
            yield folder, folder / WEIGHTS, folder / asked.codec
        return
    model = asked.model.absolute()
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as name:
        if asked.plan is not None:
            yield Path(name), model, asked.plan.absolute()
            return
        path, text = Path(name) / asked.codec, asked.calibrate or model / "calibration.txt"
        planned(model, text, tp_size=asked.nodes, codec=asked.codec).save(path)
        yield Path(name), model, path


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of a word for each token."""
    words = {f"t{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@dataclass(frozen=True)
class Server:
    """A node's part of a server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait(self) -> None:
        """Wait until it answers; NarrowcastError if it ends before."""
        while self.process.poll() is None:
            with suppress(OSError), urlopen(f"{self.url}/health"):
                return
            time.sleep(0.2)
        raise NarrowcastError(f"vLLM ended with: {self.log.read_text(errors='replace')[-TOLD:]}")

    def said(self) -> str:
        """The lines of its log that are narrowcast's."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "; ".join(line.partition("] ")[2] for line in lines if f"[{SAYS}:" in line)


@contextmanager
def serving(setting: Setting, sums: str, ports: Sequence[int], addresses: Sequence[str]) -> Iterator[Server]:
    """This node's part of a server."""
    rank, (port, master_port) = dist.get_rank(), ports
    options = {
        "--tensor-parallel-size": len(addresses),
        "--nnodes": len(addresses),
        "--node-rank": rank,
        "--master-addr": addresses[0],
        "--master-port": master_port,
        "--dtype": "bfloat16",
        "--max-model-len": setting.max_model_len,
        "--max-num-batched-tokens": setting.prompt + setting.decode,
        "--max-num-seqs": setting.at_once,
        "--kv-cache-memory-bytes": KV_CACHE_NBYTES,
    }
    command = [setting.python.with_name("vllm"), "serve", setting.model, "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] if setting.eager else []
    command += ["--port", port, "--host", addresses[0]] if rank == 0 else ["--headless"]
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS} | ENVIRONMENT
    cores = str(rank) if len(addresses) <= (os.cpu_count() or 1) else "nobind"  # else two would wait for one core
    environment |= {"VLLM_HOST_IP": addresses[rank], "VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CACHE_ROOT": str(setting.folder / "cache")}
    if sums == PLANNED:
        environment |= {"NARROWCAST_PLAN": setting.plan.name, "NARROWCAST_TUNE": "1"}
    path = setting.folder / f"{sums} {rank}.log"
    with path.open("w") as log:
        arguments = [*BOUND_TO_PARENT, *command, *(part for option in options.items() for part in option)]
        process = subprocess.Popen(
            [str(each) for each in arguments],
            cwd=setting.plan.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(process, f"http://{addresses[0]}:{port}", path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def on_node(setting: Setting) -> tuple[dict[str, dict[str, Any]], str] | None:
    """Figures by sums, and what the plan's log says; on the first node."""
    addresses, ports = _told(own_address(None)), _told([_free_ports() for _ in WAYS])[0]
    servers, found = {}, None
    with ExitStack() as stack:
        for sums, each in zip(WAYS, ports, strict=True):
            servers[sums] = stack.enter_context(serving(setting, sums, each, addresses))
            if dist.get_rank() == 0:
                servers[sums].wait()
            dist.barrier()  # one after the other, as tuning wants the machine for itself
        if dist.get_rank() == 0:
            figures = _benched(setting, [server.url for server in servers.values()])
            found = dict(zip(WAYS, figures, strict=True)), servers[PLANNED].said()
        dist.barrier()
    return found


def _benched(setting: Setting, urls: Sequence[str]) -> list[dict[str, Any]]:
    sizes = {name: getattr(setting, name) for name in ("prompt", "decode", "prompts", "rounds")}
    options = {"tokenizer": setting.model, "interface": DEVICE, "at-once": setting.at_once, **sizes}
    command = [setting.python, BENCH, *urls, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise NarrowcastError(f"vllm bench serve ended with: {done.stderr[-TOLD:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _told(value: Any) -> list[Any]:
    """The values of all nodes."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind((own_address(None), 0))
        return one.getsockname()[1], other.getsockname()[1]


def row(link: Link | None, sums: str, figures: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Medians; the least of times."""
    middle = {name: None if None in values else statistics.median(values) for name, values in figures.items()}
    return {
        "link": NO_LINK if link is None else str(link),
        "sums": sums,
        "prompt_s": middle["prompt_s"],
        "least_prompt_s": min(figures["prompt_s"]),
        "ms_per_token": 1e3 * middle["token_s"],
        "least_ms_per_token": 1e3 * min(figures["token_s"]),
        "tokens_per_s": middle["tokens_per_s"],
        "tokens_per_s_at_once": middle["tokens_per_s_at_once"],
        "bytes_of_prompt": middle["bytes_of_prompt"],
        "bytes_per_token": middle["bytes_per_token"],
    }


def printed(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        ["-" if each is None else f"{each:.4g}" if isinstance(each, float) else str(each) for each in row.values()]
        for row in rows
    ]
    return aligned([list(rows[0]), *cells])


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--vllm", type=Path, required=True, metavar="PYTHON")
    links = [NO_LINK, "10Gbps,0.1ms", "1Gbps,0.1ms", "100Mbps,0.1ms"]
    parser.add_argument("--link", nargs="+", default=links, metavar="RATE,DELAY")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=2, help="requests of a round", metavar="N")
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--decode", type=int, default=64, metavar="N")
    parser.add_argument("--at-once", type=int, default=4, help="requests at once, for tokens a second", metavar="N")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4992)
    parser.add_argument("--codec", default="allocated(bits=4)")
    parser.add_argument("--eager", action="store_true", help="--enforce-eager, in place of compiled graphs")
    asked = parser.parse_args()
    if asked.model is None and (asked.plan or asked.calibrate):
        parser.error("--plan and --calibrate are of a given --model")
    shape = Shape(hidden_size=asked.hidden, num_layers=asked.layers, intermediate_size=asked.intermediate)
    sizes = {name: getattr(asked, name) for name in ("eager", "prompt", "decode", "prompts", "rounds", "at_once")}
    about: dict[str, Any] = {"vllm": subprocess.check_output([asked.vllm, "-c", VERSION], text=True).strip()}
    about |= {"model": str(shape) if asked.model is None else asked.model.name, "nodes": asked.nodes}
    about |= {"plan": asked.codec if asked.plan is None else asked.plan.name}
    rows, notes = [], {}
    with prepared(asked, shape) as (folder, model, plan):
        setting = Setting(python=asked.vllm.absolute(), folder=folder, model=model, plan=plan, **sizes)
        for link in [None if each == NO_LINK else Link.parse(each) for each in asked.link]:
            with Ranks(asked.nodes, link=link, num_threads=1, timeout_s=LIMIT_S) as ranks:
                (figures, said), *_ = ranks.run(on_node, setting)
            rows += [row(link, sums, figures[sums]) for sums in (OWN, PLANNED)]
            notes[rows[-1]["link"]] = said
            print(printed(rows[-2:]), said, sep="\n", flush=True)
            reporting.write(asked.json, machine=machine(), **about, **sizes, said=notes, rows=rows)
    print(printed(rows))


if __name__ == "__main__":
    main()
