"""`narrowcast bench`: the speed of codecs, sums over ranks and whole models here, each beside its yardstick."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from narrowcast.cli import options
from narrowcast.cli.options import DEFAULT_TP, JsonOption, TensorParallel
from narrowcast.cli.progress import shown
from narrowcast.cli.tables import cores, screen, shared, table
from narrowcast.codecs import PRESETS, recipe
from narrowcast.engines import Replicated
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_report, check_writable, write_new, write_report
from narrowcast.launch import Link
from narrowcast.perf import codec as codecs
from narrowcast.perf import collective as collectives
from narrowcast.perf import model as models
from narrowcast.perf.machine import machine
from narrowcast.perf.machines import slower
from narrowcast.perf.model import Job
from narrowcast.perf.sizes import parse_sizes, written
from narrowcast.perf.timeline import trace
from narrowcast.plan.split import Split
from narrowcast.progress import Progress, tell
from narrowcast.transport import DEFAULT_TIMEOUT_S
from narrowcast.transport.tcp import COMPILED

Rows = list[dict[str, Any]]
Part = tuple[str, Iterable[dict[str, Any]]]  # what is measured, and its rows
Subject = Literal["codec", "collective", "model"]

NO_LINK = "loopback"
COLUMNS: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {  # of words, and of figures with their headings
    "codec": (("codec", "op", "path"), {"gbps": "GB/s", "memcpy_gbps": "memcpy"}),
    "collective": (
        ("nbytes", "transport", "codec", "algorithm"),
        {"wire_bytes": "sent", "median_us": "median, us", "p99_us": "p99", "limit_us": "limit"},
    ),
    "model": (
        ("codec", "transport", "prompt_chunks"),
        {"cores": "cores", "ttft_ms": "first token, ms", "decode_ms_per_token": "then, ms a token"},
    ),
}

ANSWER = {"ttft_ms": "a prompt", "decode_ms_per_token": "a token after it"}


def bench(
    subject: Annotated[Subject, typer.Argument(metavar="codec|collective|model", help="What to measure.")],
    codec: Annotated[
        list[str] | None, typer.Option("--codec", metavar="CODEC", help="Again and again for several; all for all.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Bytes of the BF16 tensor, such as 64K, or 1K..64M in steps of 4. Not for a model."),
    ] = None,
    tp: TensorParallel = DEFAULT_TP,
    link: Annotated[
        list[str] | None,
        typer.Option(metavar="RATE,DELAY", help="Emulate such links between ranks (root only), one after the other."),
    ] = None,
    transport: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(collectives.TRANSPORTS)}, one after the other.")
    ] = None,
    prompt_chunks: Annotated[
        list[str] | None, typer.Option(metavar="1|2", help="2: halves of the prompt in turns; again for both.")
    ] = None,
    replicate: Annotated[
        Replicated | None, typer.Option(metavar="NAME", help="embedding or all: whole on each rank. Of a model.")
    ] = None,
    weights: options.WeightsOption = "stored",
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Chrome trace of an answer. Of a model.")
    ] = None,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    json: JsonOption = None,
) -> None:
    """Measure kernels of codecs, sums over ranks, or a split model, each against a yardstick in the same run.

    codec: GB/s of one thread, against copying the tensor. collective: sums against the group's own all_reduce and
    against as many bytes over plain sockets. model: a Llama of 380 M parameters, against the engine's own sums, and
    against one machine. Everything that is timed must first give the right bits.
    """
    check_report(json)
    _check_options(
        subject,
        {
            "--size": (size, ["model"]),
            "--link": (link, ["codec"]),
            "--transport": (transport, ["codec"]),
            "--prompt-chunks": (prompt_chunks, ["codec", "collective"]),
            "--replicate": ([replicate] if replicate else None, ["codec", "collective"]),
            "--weights": ([weights] if weights != "stored" else None, ["codec", "collective"]),
            "--timeline": ([str(timeline)] if timeline else None, ["codec", "collective"]),
        },
    )
    if timeline is not None:
        check_writable(timeline, overwrite=False)
    if tp < 2:
        raise InvalidInputError("-tp", expected="2 or more", found=tp, remedy="One rank has nobody to send to.")
    links: Sequence[Link | None] = list(dict.fromkeys(map(Link.parse, link or ()))) or [None]
    transports = _transports(transport or ["tcp" if COMPILED else "torch"])
    if subject == "codec":
        parts = _codecs(codec, size)
    elif subject == "collective":
        parts = _collectives(codec, size, tp, links, transports, timeout)
    else:
        job = replace(
            models.DEFAULT,
            codecs=_recipes(codec, models.DEFAULT.codecs),
            transports=transports,
            prompt_chunks=[options.prompt_chunks(each) for each in prompt_chunks or "1"],
            split=Split(tp_size=tp),
            replicated=replicate or "none",
            weights=weights,
            timeout_s=timeout,
        )
        parts = _models(job, links, timeline)
    rows = _measured(parts)
    if json is not None:
        write_report(json, {"machine": machine(), "rows": rows})
    for each in dict.fromkeys(row.get("link") for row in rows):
        here = [row for row in rows if row.get("link") == each]
        title = "on one thread" if subject == "codec" else f"{tp} ranks on {each or NO_LINK}"
        _print(here, title if weights == "stored" else f"{title}, weights {weights}", *COLUMNS[subject])
        for sentence in against_one_machine(here, tp) if subject == "model" else ():
            screen().print(sentence)


def _codecs(codec: Sequence[str] | None, size: Sequence[str] | None) -> Iterator[Part]:
    for name in _recipes(codec, codecs.CODECS):
        for nbytes in parse_sizes(size or codecs.SIZES):
            yield f"{name}, {written(nbytes)}", codecs.rows(name, nbytes)


def _collectives(
    codec: Sequence[str] | None,
    size: Sequence[str] | None,
    tp: int,
    links: Sequence[Link | None],
    over: Sequence[str],
    timeout_s: float,
) -> Iterator[Part]:
    usual = collectives.DEFAULT
    sizes = parse_sizes(size) if size else usual.sizes
    sweep = replace(usual, codecs=_recipes(codec, usual.codecs), transports=over, sizes=sizes, timeout_s=timeout_s)
    for link in links:
        yield f"{tp} ranks on {link or NO_LINK}", collectives.rows(sweep, tp, link)


def _models(job: Job, links: Sequence[Link | None], timeline: Path | None) -> Iterator[Part]:
    with models.prepared(job) as folder:
        for link in links:
            yield f"{job.shape}, {job.split.world_size} ranks on {link or NO_LINK}", models.rows(job, folder, link)
        if timeline is not None:
            write_new(timeline, dumps(trace(job, folder, links)).encode(), overwrite=False)


def _measured(parts: Iterator[Part]) -> Rows:
    """The rows of all parts, each of which is told on the screen while it is measured."""
    rows: Rows = []
    with shown():
        for name, part in parts:
            tell(Progress(f"measuring {name}"))
            rows += part
    return rows


def _print(rows: Rows, title: str, words: Sequence[str], figures: Mapping[str, str]) -> None:
    found = table(title, words, figures.values())
    for row in rows:
        found.add_row(*(_cell(column, row[column]) for column in (*words, *figures)))
    screen().print(found)


def against_one_machine(rows: Rows, tp_size: int) -> Iterator[str]:
    """A sentence for each machine alone that is faster than our sums over ranks, by the fastest of these."""
    ones = [row for row in rows if row["codec"] == models.ALONE.codec]
    ours = [row for row in rows if row["codec"] not in (models.ALONE.codec, models.NATIVE.codec)]
    for one in ones:
        times_ms = {name: (one[figure], min(row[figure] for row in ours)) for figure, name in ANSWER.items()}
        ranks = f"{tp_size} ranks of {cores(ours[0]['cores'])} each"
        yield from slower(ranks, f"one machine of {cores(one['cores'])}", times_ms)
    if len(ones) > 1:
        yield shared(ones[0]["cores"])


def _cell(column: str, value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    if column == "nbytes":
        return written(int(value or 0))
    return "" if value is None else str(value)


def _check_options(subject: str, given: Mapping[str, tuple[Sequence[str] | None, Sequence[str]]]) -> None:
    """InvalidInputError for an option that means nothing to this subject."""
    for option, (value, meaningless) in given.items():
        if value and subject in meaningless:
            raise InvalidInputError(
                option, expected=f"none with {subject}", found=", ".join(value), remedy="Leave it out."
            )


def _recipes(chosen: Sequence[str] | None, otherwise: Sequence[str]) -> list[str]:
    """The codecs that were named, each of which there must be."""
    names = list(PRESETS) if chosen and "all" in chosen else list(dict.fromkeys(chosen or otherwise))
    for name in names:
        recipe(name)
    return names


def _transports(transports: Sequence[str]) -> list[str]:
    for each in transports:
        if each not in collectives.TRANSPORTS:
            known = ", ".join(collectives.TRANSPORTS)
            raise InvalidInputError("--transport", expected=f"one of {known}", found=each, remedy="Choose one of them.")
    return list(dict.fromkeys(transports))
