"""The command line: one file a group of commands."""

from typing import Annotated

import typer

from narrowcast.cli import bench, calibrate, demo, doctor, estimate, gate, model, plan, rotate, tune
from narrowcast.files import versions

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Tensor-parallel LLM inference whose devices send each other 4 bits a value."""
    if show:
        typer.echo(f"narrowcast {versions()['narrowcast']}")
        raise typer.Exit


app.command()(demo.demo)
app.command()(estimate.estimate)
app.command()(calibrate.calibrate)
app.command()(model.evaluate)
app.command()(gate.gate)
app.command()(model.generate)
app.command()(rotate.rotate)
app.add_typer(plan.app, name="plan")
app.command()(tune.tune)
app.command()(bench.bench)
app.command()(doctor.doctor)

__all__ = ["app"]
