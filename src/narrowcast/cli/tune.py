"""`narrowcast tune`: measures which way the sums of a plan should take."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from narrowcast.cli.options import Timeout, TransportOption
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank
from narrowcast.perf.tune import Tuning, tune_on_ranks
from narrowcast.plan import Plan
from narrowcast.plan.decisions import FORMS
from narrowcast.transport import DEFAULT_TIMEOUT_S


def tune(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A file that calibrate wrote. The decisions go into it.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Leave PLAN as it is, and write a new file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the new file if it exists.")] = False,
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
    tuning = tune_on_ranks(plan, transport=transport, timeout_s=timeout)
    if is_first_rank():
        tuned = replace(plan, decisions=tuning.decisions)
        tuned.save(output or path, overwrite=overwrite or output is None)
        console = Console()
        console.print(_timings(tuning))
        console.print(f"decisions written into {output or path}", markup=False)


def _timings(tuning: Tuning) -> Table:
    """Median microseconds by size and way; the chosen one with a star, what was not measured with a tilde."""
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
