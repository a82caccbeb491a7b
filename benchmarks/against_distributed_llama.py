"""One model, answering by narrowcast, distributed-llama and llama.cpp: times of its prompt and tokens, bytes of these.

usage: python benchmarks/against_distributed_llama.py [--distributed-llama CHECKOUT] [--llama-cpp PYTHON]
       [--link RATE,DELAY ...] [--rounds N] [--prompt N] [--decode N] [--layers N --hidden N --intermediate N]
       [--codec CODEC] [--json FILE] [--plot FILE.png]

CHECKOUT: a clone of github.com/b4rtaz/distributed-llama, after `make dllama`. PYTHON: that of an environment after
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`. A peer that is not given is
left out.

The same random Llama for all: in Q4_0, which is distributed-llama's Q40, in Q8_0 or BF16. On one node of 1 and 2
threads, and on two of one thread each on every link in turn (root only; "none": loopback), all in turn within a round;
medians. Four nodes have too few cores here to be timed: of them bytes alone count, on the first link that there is.
narrowcast tunes its plan on the link first and keeps of its vocabulary on each node what pays; it and llama.cpp have
answered once before. distributed-llama's times are those that it tells.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import reporting
from matplotlib.figure import Figure
from peers import distributed_llama, distributed_llama_files, gguf_file, ours
from peers.answer import Answer, Place

from narrowcast.aligned import aligned
from narrowcast.launch import Link
from narrowcast.perf import model as models
from narrowcast.perf.machine import machine
from narrowcast.perf.model import VOCAB_SIZE, WEIGHTS, Job, Shape
from narrowcast.plan.split import Split

ENGINES = OURS, DISTRIBUTED, LOCAL = "narrowcast", "distributed-llama", "llama.cpp"
TWO, FOUR = 2, 4  # nodes: timed, and counted alone
COUNTED_TOKENS = 16
TIMES = {"prompt_s": "s of the prompt", "ms_per_token": "ms of a decoded token"}
NO_LINK = "none"
DIGITS = 5  # that are printed
ANSWER_BY_LLAMA_CPP = Path(__file__).parent / "peers" / "answer_by_llama_cpp.py"
LLAMA_CPP_VERSION = "import llama_cpp; print(llama_cpp.__version__)"


@dataclass(frozen=True)
class Way:
    """An engine and the format of its weights; `answer` times it, on one node alone unless it is `split`."""

    engine: str
    weights: str
    answer: Callable[[Job, Place], Answer]
    split: bool = True

    def measured(self, job: Job, place: Place) -> Answer:
        found = self.answer(replace(job, split=Split(tp_size=place.num_nodes)), place)
        print(f"{place}: {self.engine} {self.weights}, {found.prompt_s:.2f} s, {found.ms_per_token:.1f} ms", flush=True)
        return found


def by_narrowcast(folders: Mapping[int, Path], weights: str) -> Way:
    """`folders`: what is prepared, by number of nodes."""
    return Way(
        OURS, weights, lambda job, place: ours.answer(job, folders.get(place.num_nodes, folders[TWO]), weights, place)
    )


def by_distributed_llama(checkout: Path, weights: Path, folder: Path) -> Way:
    model, tokenizer = folder / "model.m", folder / "tokenizer.t"
    distributed_llama_files.write_model(weights, model)
    distributed_llama_files.write_tokenizer(tokenizer, VOCAB_SIZE)
    files = distributed_llama.Files(program=checkout / distributed_llama.PROGRAM, model=model, tokenizer=tokenizer)
    return Way(DISTRIBUTED, distributed_llama.WEIGHTS, partial(distributed_llama.answer, files))


def by_llama_cpp(python: Path, weights: Path, folder: Path, kind: str) -> Way:
    model = folder / f"{kind}.gguf"
    gguf_file.write_gguf(weights, model, kind)

    def answer(job: Job, place: Place) -> Answer:
        sizes = {"--threads": place.num_threads, "--prompt": job.prefill, "--decode": job.decode}
        command = [python, ANSWER_BY_LLAMA_CPP, model, *itertools.chain.from_iterable(sizes.items())]
        return Answer(**json.loads(subprocess.check_output(list(map(str, command)), text=True)))

    return Way(LOCAL, kind, answer, split=False)


def all_ways(asked: argparse.Namespace, job: Job, folders: Mapping[int, Path], folder: Path) -> Iterator[Way]:
    weights = folders[TWO] / WEIGHTS
    for kind in ours.FORMATS:
        for nodes, each in folders.items():
            ours.prepare(replace(job, split=Split(tp_size=nodes)), each, kind)
        yield by_narrowcast(folders, kind)
    if asked.distributed_llama:
        yield by_distributed_llama(asked.distributed_llama, weights, folder)
    if asked.llama_cpp:
        for kind in gguf_file.FORMATS:
            yield by_llama_cpp(asked.llama_cpp, weights, folder, kind)


def row(way: Way, place: Place, answers: Sequence[Answer], *, timed: bool) -> dict[str, Any]:
    """Medians and minima of the answers' times, medians of their bytes."""
    figures = {name: [getattr(each, name) for each in answers] for name in TIMES}
    nbytes = statistics.median(each.bytes_per_token for each in answers)
    return {
        "engine": way.engine,
        "weights": way.weights,
        "nodes": place.num_nodes,
        "threads": place.num_threads,
        "link": None if place.link is None else str(place.link),
        **{name: statistics.median(each) if timed else None for name, each in figures.items()},
        **{f"least_{name}": min(each) if timed else None for name, each in figures.items()},
        "bytes_per_token": None if math.isnan(nbytes) else nbytes,
    }


def measured(job: Job, ways: Sequence[Way], links: Sequence[Link | None], rounds: int) -> Iterator[dict[str, Any]]:
    places = [*(Place(1, threads) for threads in (1, 2)), *(Place(TWO, 1, link) for link in links)]
    found: dict[tuple[Place, Way], list[Answer]] = {}
    for _, place, way in itertools.product(range(rounds), places, ways):
        if way.split or place.num_nodes == 1:
            found.setdefault((place, way), []).append(way.measured(job, place))
    yield from (row(way, place, answers, timed=True) for (place, way), answers in found.items())
    for link in [each for each in links if each is not None][:1]:
        place, brief = Place(FOUR, 1, link), replace(job, prefill=COUNTED_TOKENS, decode=COUNTED_TOKENS)
        yield from (row(way, place, [way.measured(brief, place)], timed=False) for way in ways if way.split)


def printed(rows: Sequence[Mapping[str, Any]]) -> str:
    words, figures = list(rows[0])[:5], list(rows[0])[5:]
    cells = (
        ["-" if each[name] is None else str(each[name]) for name in words]
        + ["-" if each[name] is None else f"{each[name]:.{DIGITS}g}" for name in figures]
        for each in rows
    )
    return aligned([[*words, *figures], *cells])


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A bar for each engine, its weights and the place where it answers: its prompt, and a token."""
    timed = [each for each in rows if each["ms_per_token"] is not None]
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(timed)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{_place(each)}: {each['engine']} {each['weights']}" for each in timed]
    colours = [f"C{ENGINES.index(each['engine'])}" for each in timed]
    for panel, (name, title) in zip(axes, TIMES.items(), strict=True):
        bars = panel.barh(range(len(timed)), [each[name] for each in timed], color=colours)
        panel.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        panel.set_xlabel(title)
        panel.margins(x=0.15)  # for the figures
    axes[0].set_yticks(range(len(timed)), labels, fontsize=7)
    axes[0].invert_yaxis()
    return figure


def _place(row: Mapping[str, Any]) -> Place:
    return Place(row["nodes"], row["threads"], row["link"] and Link.parse(row["link"]))


def versions(asked: argparse.Namespace) -> dict[str, str]:
    """Those of the peers that are there."""
    commands = {
        DISTRIBUTED: asked.distributed_llama and ["git", "-C", asked.distributed_llama, "rev-parse", "HEAD"],
        LOCAL: asked.llama_cpp and [asked.llama_cpp, "-c", LLAMA_CPP_VERSION],
    }
    return {name: subprocess.check_output(each, text=True).strip() for name, each in commands.items() if each}


def checkout(text: str) -> Path:
    found = Path(text).resolve()
    if not (found / distributed_llama.PROGRAM).is_file():
        raise argparse.ArgumentTypeError(f"expected a checkout after `make {distributed_llama.PROGRAM}`, found {text}")
    return found


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--distributed-llama", type=checkout, metavar="CHECKOUT")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON")
    links = [NO_LINK, "1Gbps,0.1ms", "100Mbps,0.1ms"]
    parser.add_argument("--link", nargs="+", default=links, metavar="RATE,DELAY")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--decode", type=int, default=64, metavar="N")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4992)
    parser.add_argument("--codec", default="int4-feature")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    asked = parser.parse_args()
    shape = Shape(hidden_size=asked.hidden, num_layers=asked.layers, intermediate_size=asked.intermediate)
    job = Job(shape=shape, codecs=[asked.codec], prefill=asked.prompt, decode=asked.decode)
    found = versions(asked)
    with ExitStack() as stack:
        folders = {
            nodes: stack.enter_context(models.prepared(replace(job, split=Split(tp_size=nodes))))
            for nodes in (TWO, FOUR)
        }
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="narrowcast-")))
        on = [None if each == NO_LINK else Link.parse(each) for each in asked.link]
        rows = list(measured(job, list(all_ways(asked, job, folders, files)), on, asked.rounds))
    print(printed(rows))
    for name in (DISTRIBUTED, LOCAL):
        if name not in found:
            print(f"Left out: {name}, which was not given.")
    setting = {"prompt": job.prefill, "decode": job.decode, "codec": asked.codec, "rounds": asked.rounds}
    reporting.write(asked.json, machine=machine(), peers=found, shape=str(shape), **setting, rows=rows)
    if asked.plot:
        draw(rows).savefig(asked.plot, dpi=120)


if __name__ == "__main__":
    main()
