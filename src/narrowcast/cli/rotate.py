"""`narrowcast rotate`: a model in, the same model on other axes out."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from torch import Tensor, nn

from narrowcast.calibration import observe
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli.options import (
    DEFAULT_NUM_SAMPLES,
    DEFAULT_TP,
    TEXT,
    Device,
    MaxSeqLen,
    ModelArgument,
    NumSamples,
    Overwrite,
    TensorParallel,
)
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import write_report
from narrowcast.rotation import axes as choices
from narrowcast.rotation.rotate import rotate as rotate_model

Axes = Literal["hadamard", "principal", "fisher", "joint"]

MARK = "rotation.json"
LEFT_BEHIND = (".*", "config.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def rotate(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    axes: Annotated[
        Axes,
        typer.Option(
            metavar="NAME", help="hadamard; or measured on --text: principal, fisher, joint.", rich_help_panel=TEXT
        ),
    ] = "hadamard",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To measure on.", rich_help_panel=TEXT),
    ] = None,
    tp: TensorParallel = DEFAULT_TP,
    num_samples: NumSamples = DEFAULT_NUM_SAMPLES,
    max_seq_len: MaxSeqLen = DEFAULT_LENGTH,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Write MODEL on other axes into OUT: the same answers, up to rounding, with other features in every sum.

    Partial sums are measured as -tp ranks would have them. Calibrate OUT anew: a plan for MODEL is not for it.
    """
    _check_text(axes, text)
    _check_out(Path(model), out, overwrite=overwrite)
    engine = load_engine()
    whole = engine.load(model, device=device)
    if text is None:
        rotation_EE = choices.hadamard(engine.num_features(whole))
    else:
        found = sequences(engine.load_tokenizer(model), text, length=max_seq_len, limit=num_samples)
        rotation_EE = _measured(axes, whole, found, tp)
    rotate_model(whole, rotation_EE)
    with _folder(out) as folder:
        if Path(model).is_dir():
            shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        else:
            engine.load_tokenizer(model).save_pretrained(folder)
        engine.save(whole, folder)
        measured = {} if text is None else {"text": str(text), "tp_size": tp, "sequences": len(found)}
        write_report(folder / MARK, {"source": model, "axes": axes, **measured})
    typer.echo(f"{out}: {model} on {axes} axes")


def _measured(axes: Axes, model: nn.Module, found: list[Tensor], tp_size: int) -> Tensor:
    seen = observe(model, found, tp_size=tp_size, moments="full").moments
    covariances = {site: each.partial.sum(dim=0) + each.total[0] for site, each in seen.items()}
    if axes == "principal":
        return choices.principal(covariances)
    chosen = {"fisher": choices.fisher_pooled, "joint": choices.joint}[axes]
    return chosen(covariances, {site: each.fisher for site, each in seen.items()})


def _check_text(axes: Axes, text: Path | None) -> None:
    if (axes == "hadamard") != (text is None):
        raise InvalidInputError(
            "--text",
            expected="none, as Hadamard axes are the same for all models"
            if text
            else f"text to measure {axes} axes on",
            found=text or "none",
            remedy="Leave it out, or choose other --axes." if text else "Pass a file.",
        )


def _check_out(model: Path, out: Path, *, overwrite: bool) -> None:
    """InvalidInputError if `out` may not be written: before the work, not after."""
    source, target = model.resolve(), out.resolve()
    if model.is_dir() and (source == target or source in target.parents or target in source.parents):
        raise _unwritable(out, "a folder apart from MODEL", f"{model}", "Choose another place.")
    if out.is_symlink() or (out.exists() and not _is_ours(out)):
        raise _unwritable(out, "a new folder", "something that rotate has not written", "Choose another name.")
    if out.exists() and not overwrite:
        raise _unwritable(out, "a new folder", "one that exists", "Choose another name, or pass --overwrite.")
    if not out.parent.is_dir():
        raise _unwritable(out, "a folder that exists", f"no {out.parent}", "Create it first.")


def _is_ours(out: Path) -> bool:
    try:
        return "narrowcast" in json.loads((out / MARK).read_text(encoding="utf8"))
    except (OSError, ValueError, TypeError):
        return False


def _unwritable(out: Path, expected: str, found: str, remedy: str) -> InvalidInputError:
    return InvalidInputError(str(out), expected=expected, found=found, remedy=remedy)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when it is whole; what was there goes."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "new"
        yield folder
        for file in filter(Path.is_file, folder.rglob("*")):
            file.chmod(0o666 & ~_umask())  # Transformers writes weights for their owner alone
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)
