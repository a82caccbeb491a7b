"""`narrowcast estimate`: what a split model would send, and what that takes on a link, before there are ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast.cli.options import (
    ExpertsOption,
    ModelArgument,
    PipelineParallel,
    TensorParallel,
    TransportOption,
    checked_split,
)
from narrowcast.files import check_report, write_report
from narrowcast.launch import Link
from narrowcast.perf import estimate as estimates
from narrowcast.perf.estimate import CodecEstimate, SiteEstimate

NUMBERS = "sites", "prompt", "a token"


def estimate(
    model: ModelArgument,
    tp: TensorParallel = 2,
    pp: PipelineParallel = 1,
    experts: ExpertsOption = "slices",
    codec: Annotated[list[str], typer.Option(metavar="CODEC", help="Again and again for several.")] = [  # noqa: B006
        *estimates.CODECS
    ],
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = estimates.INPUT_LEN,
    link: Annotated[
        str | None, typer.Option(metavar="RATE,DELAY", help="Of each rank, such as 10Gbps,50us: tells times, too.")
    ] = None,
    transport: TransportOption = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures here; replaces an earlier report.")] = None,
) -> None:
    """Estimate what MODEL, split over -tp ranks and -pp stages, would send for a prompt and for each token after it.

    Reads the model's config only. With --link, tells how long that takes, too; what coding costs is measured here.
    """
    check_report(json)
    split, wire = checked_split(tp, pp, experts), None if link is None else Link.parse(link)
    found = estimates.estimate(model, split, codec, input_len=input_len, link=wire, transport=transport)
    if json is not None:
        asked = {"model": model, **asdict(split), "input_len": input_len, "transport": transport}
        rows = [asdict(each) for each in found]
        write_report(json, {**asked, "link": None if wire is None else str(wire), "codecs": rows})
    console = Console(highlight=False)
    console.print(_bytes(found, f"{Path(model).name}, {split}: a prompt of {input_len} tokens, and a token after it"))
    console.print("Payload bytes that the first rank of each stage sends by the algorithm that sends fewest.")
    if wire is not None:
        console.print(_times(found, f"on {wire} a rank"))
        console.print(
            "On the wire and in codecs, without what the model computes. native: the group's own sums, a ring. "
            "pays from: the smallest BF16 tensor whose sum is faster than a native one."
        )


def _bytes(found: Sequence[CodecEstimate], title: str) -> Table:
    table = _table(title, ("codec", "bits", "travels"), NUMBERS)
    plain = found[0]
    for each in found:
        by_kind: dict[str, list[SiteEstimate]] = {}
        for site in each.sites:
            by_kind.setdefault(site.kind, []).append(site)
        heads = [each.codec, f"{each.bits_per_value:.2f}"]
        for kind, sites in by_kind.items():
            prompt, token = sum(site.prompt_bytes for site in sites), sum(site.token_bytes for site in sites)
            table.add_row(*heads, kind, str(sum(site.number for site in sites)), _size(prompt), _size(token))
            heads = ["", ""]
        fewer = (plain.prompt_bytes / max(each.prompt_bytes, 1), plain.token_bytes / max(each.token_bytes, 1))
        total = _size(each.prompt_bytes), _size(each.token_bytes)
        less = "all" if each is plain else f"all, {fewer[0]:.2f} and {fewer[1]:.2f} times fewer"
        table.add_row("", "", less, "", *total, end_section=True)
    return table


def _times(found: Sequence[CodecEstimate], title: str) -> Table:
    table = _table(title, ("codec", "algorithm"), ("prompt, ms", "a token, ms", "pays from"))
    for each in found:
        for time in each.times:
            pays = "never" if time.pays_from_bytes is None else _size(time.pays_from_bytes)
            cells = ["?" if ms is None else f"{ms:.4g}" for ms in (time.prompt_ms, time.token_ms)]
            table.add_row(each.codec, time.algorithm, *cells, "" if time.algorithm in ("native", "") else pays)
    return table


def _table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in texts:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _size(nbytes: float) -> str:
    """Exact up to four digits, three digits of more."""
    if nbytes < 10_000:
        return str(round(nbytes))
    for unit in ("K", "M"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.3g}{unit}"
    return f"{nbytes / 1000:.3g}G"
