"""`narrowcast tune`: measures which way the sums of a plan should take."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from narrowcast.cli.options import Overwrite, Timeout, TransportOption
from narrowcast.cli.progress import shown
from narrowcast.cli.tables import screen, table
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
    overwrite: Overwrite = False,
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
    with shown():
        tuning = tune_on_ranks(plan, transport=transport, timeout_s=timeout)
    if is_first_rank():
        tuned = replace(plan, decisions=tuning.decisions)
        tuned.save(output or path, overwrite=overwrite or output is None)
        console = screen()
        console.print(_timings(tuning))
        console.print(f"decisions written into {output or path}", markup=False)


def _timings(tuning: Tuning) -> Table:
    """Median microseconds by size and way; the chosen one with a star, what was not measured with a tilde."""
    ways = list(dict.fromkeys(choice for timing in tuning.timings for choice in timing.seconds))
    found = table("us a sum; *: chosen; ~: extrapolated", (), ("tokens", "bytes", *map(str, ways)))
    for timing in tuning.timings:
        measured, best = "" if timing.measured else "~", timing.best(FORMS)
        cells = (
            f"{measured}{1e6 * timing.seconds[way]:.0f}{'*' if way == best else ' '}" if way in timing.seconds else ""
            for way in ways
        )
        found.add_row(str(timing.num_tokens), str(timing.nbytes), *cells)
    return found
