"""The folder of a rotated model: written whole or not at all, and never over what somebody else made."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_folder, is_report, write_report

MARK = "rotation.json"
LEFT_BEHIND = (".*", "config.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def save(model: nn.Module, source: str, out: Path, about: Mapping[str, Any]) -> None:
    """Write `model`, rotated, into `out`, in place of what was there, with what else the folder `source` holds.

    Of a hub name, that is the tokenizer. `about`: what its mark says of how it was made.
    """
    engine = load_engine()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "new"
        if Path(source).is_dir():
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        else:
            engine.load_tokenizer(source).save_pretrained(folder)
        engine.save(model, folder)
        write_report(folder / MARK, {"source": source, **about})
        mode = (folder / MARK).stat().st_mode
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


def check_out(model: Path, out: Path, *, overwrite: bool) -> None:
    """InvalidInputError if `out` may not be written: before the work, not after."""
    source, target = model.resolve(), out.resolve()
    exists = out.is_symlink() or out.exists()
    if model.is_dir() and (source.is_relative_to(target) or target.is_relative_to(source)):
        found = "a folder apart from MODEL", f"{model}", "Choose another place."
    elif out.is_symlink() or (exists and not is_report(out / MARK)):
        found = "a new folder", "something that rotate has not written", "Choose another name."
    elif exists and not overwrite:
        found = "a new folder", "one that exists", "Choose another name, or pass --overwrite."
    else:
        check_folder(out, out.parent)
        return
    raise InvalidInputError(str(out), expected=found[0], found=found[1], remedy=found[2])
