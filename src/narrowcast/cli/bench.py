"""`narrowcast bench`: how fast codecs, sums over ranks and whole models are here, each beside its yardstick."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast.cli.options import ReplicateVocabulary, TensorParallel
from narrowcast.codecs import PRESETS, recipe
from narrowcast.collectives import ALGORITHMS
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_report, check_writable, versions, write_report
from narrowcast.launch import emulation
from narrowcast.launch.link import Link
from narrowcast.perf import codec as codecs
from narrowcast.perf import collective as collectives
from narrowcast.perf import model as models
from narrowcast.perf import plots
from narrowcast.perf.shapes import shape_of
from narrowcast.transport.tcp import COMPILED

app = typer.Typer(help="Measure codecs, sums over ranks, and whole models.", no_args_is_help=True)

FACTOR = 4  # between the sizes of a range
BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
FAMILIES = (
    "bf16",
    "int4-feature",
    "int8-feature",
    "int4-group128",
    "int2-group32-spike",
    "fp8",
    "mxfp4",
    "nvfp4",
)
CPU_INFO = Path("/proc/cpuinfo")

Draw = Callable[[list[dict[str, Any]], Path], None]

Json = Annotated[Path | None, typer.Option(help="Write the rows here; replaces an earlier report.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the rows into this PNG file.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the PNG file if it exists.")]
Links = Annotated[
    list[str] | None,
    typer.Option(
        "--link",
        metavar="RATE,DELAY",
        help="Emulate such links between the ranks (root only): 1Gbps,0.1ms. May be given several times; "
        "without it, loopback.",
    ),
]
Codecs = Annotated[
    list[str] | None, typer.Option("--codec", metavar="PRESET", help="A preset, or all; may be given several times.")
]
Transports = Annotated[
    list[str] | None,
    typer.Option("--transport", help=f"One of {', '.join(collectives.TRANSPORTS)}; may be given several times."),
]


@app.callback()
def group() -> None:
    """Measure codecs, sums over ranks, and whole models."""


@app.command()
def codec(
    codec: Codecs = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(codecs.DTYPES)}.")] = "bf16",
    shape: Annotated[str, typer.Option(metavar="TxE", help="Tokens and features of the tensor.")] = "512x4096",
    seconds: Annotated[float, typer.Option(min=0, help="About so long for each preset.")] = 0.5,
    json: Json = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Time encode, decode and decode_sum of two payloads, on one thread, against copying the tensor.

    A preset of each family, unless some are named. Each path of kernels must give the reference's bytes first.
    """
    _check_files(json, plot, overwrite=overwrite)
    _chosen("--dtype", [dtype], codecs.DTYPES)
    presets, size = _presets(codec, FAMILIES), _shape(shape)
    rows = _measured((preset, codecs.rows(preset, dtype=dtype, shape=size, seconds_each=seconds)) for preset in presets)
    _finish(rows, json, plot, plots.draw_codecs)
    _print(
        rows,
        f"{dtype} {shape}, GB/s of the tensor on one thread",
        ["codec", "op", "path"],
        {"gbps": "GB/s", "memcpy_gbps": "memcpy"},
    )


@app.command()
def collective(
    link: Links = None,
    codec: Codecs = None,
    algorithm: Annotated[
        list[str] | None, typer.Option(help=f"One of auto, {', '.join(ALGORITHMS)}; may be given several times.")
    ] = None,
    world_size: Annotated[list[int], typer.Option(min=2, help="Ranks; may be given several times.")] = [2],  # noqa: B006
    sizes: Annotated[
        list[str],
        typer.Option(
            "--bytes", metavar="SIZE", help=f"Of the BF16 tensor: 64K, or 1K..64M in steps of {FACTOR}; repeatable."
        ),
    ] = ["1K..64M"],  # noqa: B006
    transport: Transports = None,
    seconds: Annotated[float, typer.Option(min=0, help="About so long for each size.")] = 1.0,
    json: Json = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Time sums over ranks against the group's own all_reduce, and against as many bytes over plain sockets.

    Bits are compared with the one-process twin first. Times are from when the last rank starts to when the last ends.
    """
    _check_files(json, plot, overwrite=overwrite)
    sweep = collectives.Sweep(
        codecs=_presets(codec, ["bf16", "int4-feature"]),
        algorithms=_chosen("--algorithm", algorithm or list(ALGORITHMS), ("auto", *ALGORITHMS)),
        transports=_transports(transport, list(collectives.TRANSPORTS)),
        sizes=_sizes(sizes),
        seconds=seconds,
    )
    places = [(ranks, each) for each in _links(link, max(world_size)) for ranks in dict.fromkeys(world_size)]
    rows = _measured(
        (f"{ranks} ranks on {each or plots.NO_LINK}", collectives.rows(sweep, ranks, each)) for ranks, each in places
    )
    _finish(rows, json, plot, plots.draw_collectives)
    figures = {"wire_bytes": "sent", "median_us": "median", "p99_us": "p99", "limit_us": "limit"}
    for ranks, each in places:
        here = [row for row in rows if (row["world_size"], row["link"]) == (ranks, each and str(each))]
        title = f"{ranks} ranks on {each or plots.NO_LINK}: bytes that a rank sends, us"
        _print(here, title, ["nbytes", "transport", "codec", "algorithm"], figures)


@app.command()
def model(
    link: Links = None,
    codec: Codecs = None,
    transport: Transports = None,
    parameters: Annotated[str, typer.Option(help="Of the layers of a Llama with random weights.")] = "380M",
    tp: TensorParallel = 2,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens after the first one.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Answers of each codec, in turn.")] = 3,
    replicate_vocabulary: ReplicateVocabulary = False,
    json: Json = None,
    plot: Plot = None,
    overwrite: Overwrite = False,
) -> None:
    """Time a split model's first token and those after it, against the engine's own tensor parallelism (native)."""
    _check_files(json, plot, overwrite=overwrite)
    if tp < 2:
        raise InvalidInputError("--tp", expected="2 or more", found=tp, remedy="One rank has nobody to send to.")
    links = _links(link, tp)
    job = models.Job(
        shape=shape_of(round(number("--parameters", parameters, THOUSANDS))),
        codecs=_presets(codec, ["int4-feature"]),
        transports=_transports(transport, ["tcp"]),
        tp_size=tp,
        prefill=prefill,
        decode=decode,
        rounds=rounds,
        replicate_vocabulary=replicate_vocabulary,
    )
    where = f"{job.shape}, TP {tp}"
    with models.prepared(job) as folder:
        rows = _measured((f"{where}, {each or plots.NO_LINK}", models.rows(job, folder, each)) for each in links)
    _finish(rows, json, plot, plots.draw_models)
    _print(
        rows,
        where,
        ["link", "codec", "transport"],
        {"ttft_ms": "first token, ms", "decode_ms_per_token": "then, ms a token"},
    )


def _measured(parts: Iterable[tuple[str, Iterable[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The rows of all parts, each of which is told on the screen while it is measured."""
    rows: list[dict[str, Any]] = []
    with Console(stderr=True).status("") as status:
        for what, part in parts:
            status.update(f"measuring {what}")
            rows += part
    return rows


def _finish(rows: list[dict[str, Any]], json: Path | None, plot: Path | None, draw: Draw) -> None:
    if json is not None:
        command = shlex.join(["narrowcast", *sys.argv[1:]])
        report = {"narrowcast": versions()["narrowcast"], "command": command, "versions": versions()}
        write_report(json, report | {"machine": machine(), "rows": rows})
    if plot is not None:
        draw(rows, plot)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        found = re.search(r"^model name\s*: (.*)$", CPU_INFO.read_text(encoding="utf8"), re.MULTILINE)
    except OSError:
        found = None
    return {"cpu": found[1] if found else platform.machine(), "cores": os.cpu_count()}


def _print(rows: list[dict[str, Any]], title: str, texts: Sequence[str], figures: Mapping[str, str]) -> None:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in texts:
        table.add_column(column, no_wrap=True)
    for heading in figures.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row[each]) for each in texts), *(_figure(row[each]) for each in figures))
    Console().print(table)


def _text(value: str | int | None) -> str:
    return plots.size(value) if isinstance(value, int) else value or plots.NO_LINK


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _check_files(json: Path | None, plot: Path | None, *, overwrite: bool) -> None:
    check_report(json)
    if plot is not None:
        check_writable(plot, overwrite=overwrite)
        plots.check_possible()


def _links(texts: Sequence[str] | None, world_size: int) -> list[Link | None]:
    if not texts:
        return [None]
    links = [Link.parse(text) for text in texts]
    emulation.check_possible(world_size)
    return list(dict.fromkeys(links))


def _presets(chosen: Sequence[str] | None, otherwise: Sequence[str]) -> list[str]:
    if chosen and "all" in chosen:
        return [name for name in PRESETS if name != "transform"]  # which no single site's ranges make
    for preset in chosen or ():
        recipe(preset)
    return list(dict.fromkeys(chosen or otherwise))


def _transports(chosen: Sequence[str] | None, otherwise: Sequence[str]) -> list[str]:
    """What --transport says, or `otherwise`: without the compiled module, torch.distributed."""
    return _chosen("--transport", chosen or (otherwise if COMPILED else ["torch"]), collectives.TRANSPORTS)


def _chosen(option: str, chosen: Sequence[str], known: Iterable[str]) -> list[str]:
    names = list(known)
    for each in chosen:
        if each not in names:
            raise InvalidInputError(
                option, expected=f"one of {', '.join(names)}", found=each, remedy="Choose one of them."
            )
    return list(dict.fromkeys(chosen))


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise InvalidInputError("--shape", expected="TOKENSxFEATURES", found=text, remedy="Write it as 512x4096.")
    return int(found[1]), int(found[2])


def _sizes(texts: Sequence[str]) -> list[int]:
    """What --bytes says: sizes, and ranges, whose sizes are each FACTOR times the one before."""
    sizes = set()
    for text in texts:
        first, *rest = (round(number("--bytes", part, BINARY)) for part in text.split("..", 1))
        last = rest[0] if rest else first
        while first <= last:
            sizes.add(first)
            first *= FACTOR
    if not sizes:
        raise InvalidInputError("--bytes", expected="SMALLEST..LARGEST", found=", ".join(texts), remedy="Swap them.")
    return sorted(sizes)


def number(option: str, text: str, units: Mapping[str, int]) -> float:
    """A number above nothing with a unit behind it, such as 64K."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Z]?)", text.upper(), re.ASCII)
    if found is None or found[2] not in units or float(found[1]) == 0:
        letters = ", ".join(unit for unit in units if unit)
        raise InvalidInputError(
            option, expected=f"a number and perhaps one of {letters}", found=text, remedy="Write it as 64K or 380M."
        )
    return float(found[1]) * units[found[2]]
