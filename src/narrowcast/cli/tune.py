"""`narrowcast tune`: measures which way the sums of a plan should take."""

from collections.abc import Iterator
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
from narrowcast.perf.tune import Tuning, Way, changes, tune_on_ranks
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
        for line in _changes(plan, tuning, output or path):
            console.print(line, markup=False)


def _changes(plan: Plan, tuning: Tuning, path: Path) -> Iterator[str]:
    """Lines on what is otherwise now, in time and bytes, and on what to look at again because of that."""
    recoded = set()
    for num_tokens, (before, after) in changes(plan, tuning).items():
        tokens = "a token" if num_tokens == 1 else f"{num_tokens} tokens"
        yield f"sums of {tokens}: {_way(before)}" + (f" -> {_way(after)}" if after != before else ", as before")
        if after.choice.form == "coded" and after.choice != before.choice:
            recoded.add(after.choice.algorithm)
    for algorithm in sorted(recoded):
        yield (
            f"{algorithm} makes other errors than what was chosen before: look at the quality again, "
            f"narrowcast evaluate MODEL --plan {path} --algorithm {algorithm}"
        )


def _way(way: Way) -> str:
    taken = "" if way.seconds is None else f" {1e6 * way.seconds:.0f} us each,"
    return f"{way.choice},{taken} {way.nbytes:,} bytes of all"


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
