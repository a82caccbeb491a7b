"""The folder of a model that a command makes of another: written whole or not at all, and never over a user's own."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from narrowcast.engines.base import Engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_folder, is_report, unwritable, write_report

MARKS = {"rotate": "rotation.json", "pack": "packing.json"}  # by the command that leaves it in what it writes
WEIGHTS = "config.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json"
LEFT_BEHIND = (".*", *WEIGHTS, *MARKS.values())


@contextmanager
def written(engine: Engine, source: str, out: Path, command: str, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to write the model into, which then takes the place of `out`; if that fails, `out` is as it was.

    What else the folder `source` holds is there already; of a GGUF file or a hub name, the tokenizer. `about`: what the
    mark says of how it was made.
    """
    with _written_in(out), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "new"
        if Path(source).is_dir():
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        else:
            engine.load_tokenizer(source).save_pretrained(folder)
        yield folder
        mark = folder / MARKS[command]
        write_report(mark, {"source": source, **about})
        mode = mark.stat().st_mode
        for file in filter(Path.is_file, folder.rglob("*")):
            file.chmod(mode)  # Transformers writes weights for their owner alone
        if not out.exists():
            folder.rename(out)
            return
        old = out.rename(Path(temporary) / "old")
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise


@contextmanager
def _written_in(out: Path) -> Iterator[None]:
    """A full disk, say, in a sentence."""
    try:
        yield
    except OSError as error:
        raise unwritable(out, error) from error


def check_out(model: Path, out: Path, command: str, *, overwrite: bool) -> None:
    """InvalidInputError if `out` may not be written: before the work, not after."""
    source, target = model.resolve(), out.resolve()
    exists = out.is_symlink() or out.exists()
    if model.exists() and (source.is_relative_to(target) or target.is_relative_to(source)):
        found = "a folder apart from MODEL", f"{model}", "Choose another place."
    elif out.is_symlink() or (exists and not is_report(out / MARKS[command])):
        found = "a new folder", f"something that {command} has not written", "Choose another name."
    elif exists and not overwrite:
        found = "a new folder", "one that exists", "Choose another name, or pass --overwrite."
    else:
        check_folder(out, out.parent)
        return
    raise InvalidInputError(str(out), expected=found[0], found=found[1], remedy=found[2])
