"""`narrowcast rotate`: a model in, the same model on other axes out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli import options
from narrowcast.cli.options import TEXT, option
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.rotation import folder
from narrowcast.rotation.rotate import rotate as rotate_model
from narrowcast.rotation.search import Axes, search


def rotate(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    axes: Annotated[
        Axes, option(TEXT, "NAME", "hadamard; or measured on --text: principal, fisher, joint.")
    ] = "hadamard",
    text: Annotated[Path | None, option(TEXT, "FILE", "To measure on.")] = None,
    tp: options.TensorParallel = options.DEFAULT_TP,
    num_samples: options.NumSamples = options.DEFAULT_NUM_SAMPLES,
    max_seq_len: options.MaxSeqLen = DEFAULT_LENGTH,
    device: options.Device = "cpu",
    overwrite: options.Overwrite = False,
) -> None:
    """Write MODEL on other axes into OUT: the same answers, up to rounding, with other features in every sum.

    Partial sums are measured as -tp ranks would have them. Calibrate OUT anew: a plan for MODEL is not for it.
    """
    _check_text(axes, text)
    folder.check_out(Path(model), out, overwrite=overwrite)
    engine, found = load_engine(), []
    whole = engine.load(model, device=device)
    about: dict[str, Any] = {"axes": axes}
    if text is not None:
        found = sequences(engine.load_tokenizer(model), text, length=max_seq_len, limit=num_samples)
        about |= {"text": str(text), "tp_size": tp, "sequences": len(found)}
    rotate_model(whole, search(whole, axes, found, tp_size=tp))
    folder.save(whole, model, out, about)
    typer.echo(f"{out}: {model} on {axes} axes")


def _check_text(axes: Axes, text: Path | None) -> None:
    if axes == "hadamard" and text is not None:
        expected, remedy = "none, as Hadamard axes are the same for all models", "Leave it out, or choose other --axes."
    elif axes != "hadamard" and text is None:
        expected, remedy = f"text to measure {axes} axes on", "Pass a file."
    else:
        return
    raise InvalidInputError("--text", expected=expected, found=text or "none", remedy=remedy)
