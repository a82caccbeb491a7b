"""`narrowcast pack`: a model in, the same in few bits out, as kernels read them."""

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli import options
from narrowcast.cli.progress import shown
from narrowcast.engines import load_engine, model_folder

MB = 1e6


def pack(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    weights: options.WeightsOption = "stored",
    overwrite: options.Overwrite = False,
) -> None:
    """Write MODEL into OUT in few bits, as kernels read them: loaded at once, and larger than memory if need be.

    The same answers as of MODEL with these --weights, and the same plans. Takes little memory itself.
    """
    model_folder.check_out(Path(model), out, "pack", overwrite=overwrite)
    engine = load_engine()
    with shown(), model_folder.written(engine, model, out, "pack", {"weights": weights}) as folder:
        engine.pack(model, folder, weights=weights)
    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    typer.echo(f"{out}: {model}, {nbytes / MB:,.0f} MB")
