"""`narrowcast monitor`: watching servers."""

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli import options
from narrowcast.monitoring.alerts import ERROR_FACTOR
from narrowcast.monitoring.export import RUNBOOK
from narrowcast.monitoring.export import export as export_into

monitor = typer.Typer(no_args_is_help=True, help="Watch servers: alerts, a dashboard.")


@monitor.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write into.")],
    ttft: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Mean until first tokens; alert if half as much again.")
    ] = None,
    error_factor: Annotated[
        float, typer.Option(metavar="N", help="Alert on errors of so many times the plan's.")
    ] = ERROR_FACTOR,
    runbook: Annotated[str, typer.Option(metavar="URL", help="Where docs/monitoring.md can be read.")] = RUNBOOK,
    overwrite: options.Overwrite = False,
) -> None:
    """Write alert rules for Prometheus, and a dashboard for Grafana, into DIR."""
    paths = export_into(folder, error_factor=error_factor, ttft_s=ttft, runbook=runbook, overwrite=overwrite)
    typer.echo("\n".join(map(str, paths)))
