"""`narrowcast estimate`: what a split model would send, and what that takes on a link, before there are ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from narrowcast.cli.options import (
    DEFAULT_TP,
    RUN,
    ExpertsOption,
    JsonOption,
    ModelArgument,
    PipelineParallel,
    TensorParallel,
    TransportOption,
    WeightsOption,
    checked_split,
    option,
)
from narrowcast.cli.progress import shown
from narrowcast.cli.tables import screen, table
from narrowcast.engines import Matrix, Weights, load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_report, write_report
from narrowcast.launch import Link
from narrowcast.perf import estimate as perf
from narrowcast.perf.compute import Machine, typical
from narrowcast.perf.estimate import CodecEstimate, SiteEstimate
from narrowcast.perf.machines import MachinesEstimate, one_and_several, verdicts, written_ms
from narrowcast.perf.replication import ReplicationEstimate, replication
from narrowcast.progress import Progress, tell


def estimate(
    model: ModelArgument,
    tp: TensorParallel = DEFAULT_TP,
    pp: PipelineParallel = 1,
    experts: ExpertsOption = "slices",
    codec: Annotated[list[str], typer.Option(metavar="CODEC", help="Again and again for several.")] = [  # noqa: B006
        *perf.CODECS
    ],
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = perf.INPUT_LEN,
    link: Annotated[
        str | None, typer.Option(metavar="RATE,DELAY", help="Of each rank, such as 10Gbps,50us: tells times, too.")
    ] = None,
    transport: TransportOption = "auto",
    weights: WeightsOption = "stored",
    machine: Annotated[
        str | None, option(RUN, "FIGURES", "Of each, such as 50GBps,2TFLOPS,32GB; else measured.", "--machine")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Estimate what MODEL, split over -tp ranks and -pp stages, would send for a prompt and for each token after it.

    Reads the model's config only. With --link, tells how long that takes, too, and one machine alone; what coding and
    products cost is measured here.
    """
    check_report(json)
    split, wire = checked_split(tp, pp, experts), None if link is None else Link.parse(link)
    _check_used({"--weights": weights if weights != "stored" else None, "--machine": machine}, link)
    console, engine = screen(), load_engine()
    with shown():
        obstacle = engine.obstacle(engine.skeleton(model), split)
        found = perf.estimate(model, split, codec, input_len=input_len, link=wire, transport=transport)
        computes = None if wire is None else _computing(model, weights, machine)
        kept = []
        if tp > 1:
            kept = replication(model, split, input_len=input_len, link=wire, transport=transport, weights=weights)
    beside = [] if computes is None else one_and_several(*computes, split, found, input_len)
    if obstacle:
        console.print(f"no ranks can be split so: {obstacle}")
    if json is not None:
        asked = {"model": model, **asdict(split), "input_len": input_len, "transport": transport, "weights": weights}
        rows = [asdict(each) for each in found]
        whole = [asdict(each) for each in kept]
        told = {"codecs": rows, "replication": whole, "machines": [asdict(each) for each in beside]}
        write_report(json, {**asked, "link": None if wire is None else str(wire), **told})
    console.print(_bytes(found, f"{Path(model).name}, {split}: a prompt of {input_len} tokens, and a token after it"))
    console.print("Payload bytes that the first rank of each stage sends by the algorithm that sends fewest.")
    if wire is not None:
        console.print(_times(found, f"on {wire} a rank"))
        console.print(
            "On the wire and in codecs, without what the model computes. native: the group's own sums, a ring. "
            "pays from: the smallest BF16 tensor whose sum is faster than a native one."
        )
    if computes is not None:
        _print_machines(console, beside, computes[1], f"one machine, and {split}, weights {weights}")
    if kept:
        console.print(_replication(kept, "kept whole on every rank (generate --replicate)"))


def _check_used(given: Mapping[str, str | None], link: str | None) -> None:
    """InvalidInputError for an option that tells times, which need a link."""
    for name, value in given.items():
        if value is not None and link is None:
            raise InvalidInputError(name, expected="--link beside it", found="none", remedy="Pass --link 1Gbps,0.1ms.")


def _computing(model: str, weights: Weights, machine: str | None) -> tuple[Sequence[Matrix], Machine]:
    """The model's matrices, and a machine that multiplies by them."""
    given = None if machine is None else Machine.parse(machine)
    matrices = load_engine().matrices(model, weights=weights)
    tell(Progress("timing products"))
    return matrices, given or Machine.measured(typical(matrices))


def _print_machines(console: Console, estimates: Sequence[MachinesEstimate], machine: Machine, title: str) -> None:
    """A table that tells what one machine takes beside several, on what figures, and sentences on what to see in it."""
    figures = ("each holds", "prompt, ms", "products", "a token, ms", "products")
    found = table(title, ("machines", "codec"), figures)
    for each in estimates:
        times = each.prompt_ms, each.prompt_products_ms, each.token_ms, each.token_products_ms
        cells = ("?" if ms is None else written_ms(ms) for ms in times)
        found.add_row(str(each.machines), each.codec, _size(each.weights_bytes), *cells)
    console.print(found)
    console.print(
        f"Roughly: products of a token at {machine.read_bps / 1e9:.2g} GB/s of weights, of a prompt at "
        f"{2 * machine.macs_per_s / 1e12:.2g} TFLOPS, {machine.origin}; attention, norms and Python come on top."
    )
    for sentence in verdicts(estimates, machine):
        console.print(sentence)


def _replication(estimates: Sequence[ReplicationEstimate], title: str) -> Table:
    """Bytes that a rank holds and reads more, and sends less, with milliseconds where they are known."""
    found = table(title, ("matrix",), ("memory", "reads a token", "saves of a prompt", "of a token"))
    for each in estimates:
        read = _with_ms(each.read_bytes, each.read_ms if each.read_bytes else None)
        saved = _with_ms(each.prompt_bytes, each.prompt_ms), _with_ms(each.token_bytes, each.token_ms)
        found.add_row(each.matrix, _size(each.held_bytes), read, *saved)
    return found


def _with_ms(nbytes: int, ms: float | None) -> str:
    return _size(nbytes) if ms is None else f"{_size(nbytes)}, {ms:.3g} ms"


def _bytes(estimates: Sequence[CodecEstimate], title: str) -> Table:
    found = table(title, ("codec", "bits", "travels"), ("sites", "prompt", "a token"))
    plain = _nbytes(estimates[0].sites)
    for each in estimates:
        heads = [each.codec, f"{each.bits_per_value:.2f}"]
        for kind in dict.fromkeys(site.kind for site in each.sites):
            sites = [site for site in each.sites if site.kind == kind]
            found.add_row(*heads, kind, str(sum(site.number for site in sites)), *map(_size, _nbytes(sites)))
            heads = ["", ""]
        total = _nbytes(each.sites)
        prompt, token = (before / max(now, 1) for before, now in zip(plain, total, strict=True))
        less = "" if each is estimates[0] else f", {prompt:.2f} and {token:.2f} times fewer"
        found.add_row("", "", f"all{less}", "", *map(_size, total), end_section=True)
    return found


def _nbytes(sites: Sequence[SiteEstimate]) -> tuple[int, int]:
    """Bytes for the prompt, and for a token after it."""
    return sum(site.prompt_bytes for site in sites), sum(site.token_bytes for site in sites)


def _times(estimates: Sequence[CodecEstimate], title: str) -> Table:
    found = table(title, ("codec", "algorithm"), ("prompt, ms", "a token, ms", "pays from"))
    for each in estimates:
        for time in each.times:
            cells = ["?" if ms is None else f"{ms:.4g}" for ms in (time.prompt_ms, time.token_ms)]
            pays = "never" if time.pays_from_bytes is None else _size(time.pays_from_bytes)
            found.add_row(each.codec, time.algorithm, *cells, "" if time.algorithm in ("native", "") else pays)
    return found


def _size(nbytes: float) -> str:
    """Exact up to four digits, three digits of more."""
    if nbytes < 10_000:
        return str(round(nbytes))
    for unit in ("K", "M"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.3g}{unit}"
    return f"{nbytes / 1000:.3g}G"
