"""`narrowcast plan`: looking into a plan, and measuring which way its sums should take."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast.cli.options import Timeout, TransportOption
from narrowcast.codecs import Codec, FeatureCodec
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import drawings
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank, run
from narrowcast.perf.tune import Tuning
from narrowcast.perf.tune import tune as tune_plan
from narrowcast.plan import Plan, Site
from narrowcast.plan.decisions import FORMS
from narrowcast.plan.summary import bits_by_site, codec_name, with_ranges
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport, connect_group

app = typer.Typer(help="Look into plans, and tune them.", no_args_is_help=True)

# Stage, its title, and what the expected error is of: an algorithm, or a value that is coded once.
STAGES = (
    (0, "What the ranks put in (stage 0)", ("one_shot", "once")),
    (1, "Sums, where they travel again (stage 1)", ("two_shot",)),
    (2, "Sums of nodes (stage 2)", ("hierarchical",)),
)


@app.callback()
def group() -> None:
    """Look into plans, and tune them."""


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A file that calibrate wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the ranges of each site into this PNG file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the PNG file if it exists.")] = False,
) -> None:
    """Show a plan: what was tuned, sites, codecs, bits, outliers, scales and expected errors at a glance."""
    if plot is not None:
        check_writable(plot, overwrite=overwrite)
    plan = Plan.load(path)
    console = Console()
    console.print(f"[bold]{escape(str(path))}[/]  {plan.split}  fingerprint {plan.fingerprint[:16]}")
    console.print("model: " + ", ".join(f"{key} {value}" for key, value in plan.model.config.items()))
    console.print("calibration: " + ", ".join(f"{key} {value}" for key, value in plan.calibration.items()))
    if plan.groups:
        console.print(f"nodes: {', '.join(str(list(group)) for group in plan.groups)}", highlight=False)
    for line in _decisions(plan):
        console.print(line, highlight=False)
    for stage, title, errors in STAGES:
        if any(stage < len(site.codecs) for site in plan.sites.values()):
            console.print(_table(plan, stage, title, errors))
    if plot is not None:
        if not (sites := with_ranges(plan)):
            raise InvalidInputError(
                "--plot",
                expected="a plan with calibrated ranges, such as int4-feature's",
                found=f"codecs {', '.join(sorted({codec_name(site.codecs[0]) for site in plan.sites.values()}))}",
                remedy="Inspect it without --plot.",
            )
        drawings.ranges(sites, str(plan.split)).savefig(plot, dpi=120, format="png")
        console.print(f"ranges drawn into {plot}", markup=False)


@app.command()
def tune(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A file that calibrate wrote. The decisions go into it.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Leave PLAN as it is, and write a new file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the new file if it exists.")] = False,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long to measure, about: longer where other work makes times unsteady.")
    ] = 1.0,
    transport: TransportOption = "auto",
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Measure on the ranks which sums are worth coding, and by which algorithm; write that into PLAN.

    Starts the ranks on this machine; under torchrun, uses those that it started. Run it where the model will run: what
    is found holds for this link and these machines.
    """
    if output is not None:
        check_writable(output, overwrite=overwrite)
    plan = Plan.load(path)
    check_transport(transport)
    data, world_size = plan.to_bytes(), plan.split.world_size
    tuning = run(_tune_on_rank, world_size, data, path, transport, seconds, timeout, timeout_s=timeout)[0]
    if is_first_rank():
        tuned = replace(plan, decisions=tuning.decisions)
        tuned.save(output or path, overwrite=overwrite or output is None)
        console = Console()
        console.print(_timings(tuning))
        console.print(f"decisions written into {output or path}", markup=False)


def _tune_on_rank(data: bytes, path: Path, transport: str, seconds: float, timeout_s: float) -> Tuning:
    ranks = connect_group(None, transport=transport, device=torch.device("cpu"), timeout_s=timeout_s)
    return tune_plan(Plan.from_bytes(data, path), ranks, budget_s=seconds)


def _timings(tuning: Tuning) -> Table:
    """Median microseconds by size and way; the chosen one in bold, what was not measured in italics."""
    ways = list(dict.fromkeys(choice for timing in tuning.timings for choice in timing.seconds))
    table = Table(title="us a sum; *: chosen; ~: extrapolated", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("tokens", "bytes", *map(str, ways)):
        table.add_column(column, justify="right", no_wrap=True)
    for timing in tuning.timings:
        best = timing.best(FORMS)
        marks = {way: ("" if timing.measured else "~", "*" if way == best else " ") for way in ways}
        cells = (
            f"{marks[way][0]}{1e6 * timing.seconds[way]:.0f}{marks[way][1]}" if way in timing.seconds else ""
            for way in ways
        )
        table.add_row(str(timing.num_tokens), str(timing.nbytes), *cells)
    return table


def _decisions(plan: Plan) -> Iterator[str]:
    """Which way sums take, by their number of tokens."""
    decisions = plan.decisions
    if not decisions.coded:
        yield "not tuned: every sum is coded, whatever its size"
    for what, tables in (("sums", decisions.coded), ("sums that are not coded", decisions.plain)):
        for num_features, thresholds in tables.items():
            ways = ", ".join(f"{choice} from {num_tokens} tokens on" for num_tokens, choice in thresholds)
            yield f"tuned over {decisions.transport}, {what} of {num_features} features: {ways}"


def _table(plan: Plan, stage: int, title: str, errors: tuple[str, ...]) -> Table:
    title += f": scales, and the relative RMS error of {' or '.join(errors)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows, bits = [], bits_by_site(plan)
    for name, site in plan.sites.items():
        if stage < len(site.codecs):
            error = next((f"{site.error[name]:.3f}" for name in errors if name in site.error), "")
            short = name.removeprefix("model.").removeprefix("layers.")
            codec = site.codecs[stage]
            transformed = _components(site, stage)
            bits_here = f"{bits[name][stage]:.4f}"
            rows.append((short, site.kind, codec_name(codec), *transformed, bits_here, *_scales(codec), error))
    columns = "site", "kind", "codec", "axes", "components", "bits", "outliers", "min", "median", "max", "error"
    alike = len({site.kind for site in plan.sites.values()}) == 1
    crowded_out = {"kind"} if alike else {"min", "max"}  # a table of 80 columns
    shown = [
        place for place, column in enumerate(columns) if column not in crowded_out and any(row[place] for row in rows)
    ]
    for place in shown:
        table.add_column(columns[place], justify="right" if place > 2 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _components(site: Site, stage: int) -> tuple[str, str]:
    """Along whose axes how many components travel; nothing where features do."""
    if site.transform is None:
        return "", ""
    num_sent = site.transform.num_reduced if stage else site.transform.num_components
    return site.transform.axes, str(num_sent)


def _scales(codec: Codec) -> tuple[str, ...]:
    """Number of outliers; smallest, median and largest scale."""
    if not isinstance(codec, FeatureCodec):
        return ("",) * 4
    scale = codec.scale.float()
    return str(len(codec.outliers)), *(f"{value:.2g}" for value in (scale.min(), scale.median(), scale.max()))
