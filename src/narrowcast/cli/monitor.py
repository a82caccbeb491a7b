"""`narrowcast monitor`: watching servers."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from narrowcast.cli import options
from narrowcast.cli.tables import screen
from narrowcast.cli.top import picture
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import Baseline
from narrowcast.monitoring.alerts import ERROR_FACTOR
from narrowcast.monitoring.export import RUNBOOK
from narrowcast.monitoring.export import export as export_into
from narrowcast.monitoring.figures import History
from narrowcast.monitoring.scrape import address_of, scraped
from narrowcast.scorecard import Record

monitor = typer.Typer(no_args_is_help=True, help="Watch servers: alerts, a dashboard, a live view.")


@monitor.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write into.")],
    ttft: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Mean until first tokens; alert if half as much again.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, of what baseline record wrote.")
    ] = None,
    error_factor: Annotated[
        float, typer.Option(metavar="N", help="Alert on errors of so many times the plan's.")
    ] = ERROR_FACTOR,
    runbook: Annotated[str, typer.Option(metavar="URL", help="Where docs/monitoring.md can be read.")] = RUNBOOK,
    overwrite: options.Overwrite = False,
) -> None:
    """Write alert rules for Prometheus, and a dashboard for Grafana, into DIR."""
    if baseline is not None:
        if ttft is not None:
            raise InvalidInputError("--baseline", expected="no --ttft", found=ttft, remedy="Leave out one of the two.")
        ttft = Record.of(Baseline.load(baseline)).first_token_s
    paths = export_into(folder, error_factor=error_factor, ttft_s=ttft, runbook=runbook, overwrite=overwrite)
    typer.echo("\n".join(map(str, paths)))


@monitor.command()
def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of narrowcast serve, or of vLLM with a plan or a codec.")],
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="From one picture to the next.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one, as where there is no terminal.")] = False,
) -> None:
    """Show what a server does now: tokens, latency, bits, bytes saved, errors by site. Ctrl-C ends it."""
    address, history = address_of(url), History()
    with contextlib.suppress(KeyboardInterrupt):
        history.add(scraped(address))
        if once or not sys.stdout.isatty():
            time.sleep(interval)
            history.add(scraped(address))
            screen().print(picture(history.figures(), url))
            return
        with Live(picture(history.figures(), url), console=screen(), screen=True, auto_refresh=False) as live:
            answered, silent = time.monotonic(), ""
            while True:
                time.sleep(interval)
                try:
                    history.add(scraped(address))
                    answered, silent = time.monotonic(), ""
                except InvalidInputError as error:
                    silent = f"no answer for {time.monotonic() - answered:.0f} s: {error.__cause__ or error}"
                live.update(picture(history.figures(), url, silent=silent), refresh=True)
