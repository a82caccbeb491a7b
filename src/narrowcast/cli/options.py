"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name.")]
TensorParallel = Annotated[int, typer.Option("--tp", "-tp", "--tensor-parallel-size", min=2, help="Number of ranks.")]
Device = Annotated[str, typer.Option(help="Where the whole model computes: cpu, cuda, ...")]
PlanOption = Annotated[Path, typer.Option("--plan", help="A plan that calibrate wrote.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a sequence at most.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a rank before it counts as lost.")]
Algorithm = Annotated[
    Literal["auto", "one_shot", "two_shot", "hierarchical"], typer.Option(help="How the ranks add up.")
]
