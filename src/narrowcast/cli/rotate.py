"""`narrowcast rotate`: a model in, the same model on other axes out."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli import options
from narrowcast.cli.options import TEXT, option
from narrowcast.cli.progress import shown
from narrowcast.cli.verdicts import tell
from narrowcast.engines import load_engine, model_folder
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.continuations import continuations
from narrowcast.rotation.rotate import rotate as rotate_model
from narrowcast.rotation.search import Axes, search
from narrowcast.scores import compare, log_probs

NUM_JUDGED = 4  # sequences that the model is compared on before and after
BEGINNING, MAX_OWN_WORDS = "The", 128


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
    model_folder.check_out(Path(model), out, "rotate", overwrite=overwrite)
    engine, found = load_engine(), []
    with shown():
        whole, tokenizer = engine.load(model, device=device, weights="dense"), engine.load_tokenizer(model)
        about: dict[str, Any] = {"axes": axes}
        if text is not None:
            found = sequences(tokenizer, text, length=max_seq_len, limit=num_samples)
            about |= {"text": str(text), "tp_size": tp, "sequences": len(found)}
        judged = found[:NUM_JUDGED] or [_own_words(whole, tokenizer)]
        before = [log_probs(whole, ids) for ids in judged]
        rotate_model(whole, search(whole, axes, found, tp_size=tp))
        kl = compare(before, (log_probs(whole, ids) for ids in judged), judged).kl_nats
        about |= {"kl_nats": float(f"{kl:.4g}")}
        with model_folder.written(engine, model, out, "rotate", about) as folder:
            engine.save(whole, folder)
    typer.echo(f"{out}: {model} on {axes} axes")
    tell(kl, f"on {sum(ids.numel() for ids in judged)} tokens", to_try="other --axes, or the model as it is")


def _own_words(model: Any, tokenizer: Any) -> Tensor:
    """Token ids [1, T] that the model itself says, where nobody gave text to judge by."""
    begin = tokenizer(BEGINNING, return_tensors="pt").input_ids
    (said,) = continuations(model, [begin], MAX_OWN_WORDS)
    return torch.cat([begin, torch.tensor([said], dtype=begin.dtype)], dim=1)


def _check_text(axes: Axes, text: Path | None) -> None:
    if axes == "hadamard" and text is not None:
        expected, remedy = "none, as Hadamard axes are the same for all models", "Leave it out, or choose other --axes."
    elif axes != "hadamard" and text is None:
        expected, remedy = f"text to measure {axes} axes on", "Pass a file."
    else:
        return
    raise InvalidInputError("--text", expected=expected, found=text or "none", remedy=remedy)
