"""The command line: one file a group of commands."""

import typer

from narrowcast.cli import demo, doctor, model, plan

app = typer.Typer(
    help="Tensor-parallel LLM inference whose devices send each other 4 bits a value.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo.demo)
app.command()(model.calibrate)
app.command()(model.evaluate)
app.command()(model.generate)
app.add_typer(plan.app, name="plan")
app.command()(doctor.doctor)

__all__ = ["app"]
