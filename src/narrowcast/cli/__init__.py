"""The command line: a file a command, which parses, calls and prints."""

from typing import Annotated

import typer

from narrowcast.cli import (
    baseline,
    bench,
    calibrate,
    chat,
    codecs,
    demo,
    doctor,
    estimate,
    evaluate,
    generate,
    inspect,
    monitor,
    pack,
    rotate,
    serve,
    tune,
)
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


for command in (
    *(demo.demo, estimate.estimate, calibrate.calibrate, evaluate.evaluate, inspect.inspect, tune.tune),
    *(generate.generate, serve.serve, chat.chat, pack.pack, rotate.rotate, bench.bench, codecs.codecs, doctor.doctor),
):
    app.command()(command)
app.add_typer(monitor.monitor, name="monitor")
app.add_typer(baseline.app, name="baseline")

__all__ = ["app"]
