"""Writing files: whole or not at all, and never over what a user made unless asked."""

import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import stat
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from narrowcast.errors import InvalidInputError

HTML_MARK = '<meta name="generator" content="narrowcast">'
PROBE_NBYTES = 1 << 14
PACKAGES = (
    *("narrowcast", "torch", "numpy", "safetensors"),
    *("transformers", "accelerate", "typer", "rich", "matplotlib", "lm-eval"),
)


def write_new(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write `data` where `path` leads, whole or not at all. A link stays one; a device or a pipe is written to.

    InvalidInputError if there is a file, not an empty one, and `overwrite` is not set, or if it cannot be written.
    """
    check_writable(path, overwrite=overwrite)
    try:
        if _is_special(path):
            _write_into(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data, overwrite=overwrite or _is_empty(path))
    except FileExistsError:
        check_writable(path, overwrite=overwrite)
        raise
    except OSError as error:
        raise unwritable(path, error) from error


def check_writable(path: Path, *, overwrite: bool) -> None:
    """InvalidInputError if `path` exists and may not be replaced, or cannot be written: before the work, not after.

    An empty file, as mktemp makes, may always be replaced.
    """
    special = _is_special(path)
    if path.is_dir() or (path.exists() and not (overwrite or special or _is_empty(path))):
        raise InvalidInputError(
            str(path),
            expected="a new file",
            found="a folder" if path.is_dir() else "a file that exists",
            remedy="Choose another name"
            + ("." if path.is_dir() else ", or ask to overwrite it: --overwrite, in Python overwrite=True."),
        )
    if not special:
        check_folder(path, Path(os.path.realpath(path)).parent)


def check_folder(path: Path, folder: Path) -> None:
    """InvalidInputError if nothing can be written into `folder`, where `path` is to be: tried with a few KB."""
    if not folder.is_dir():
        raise InvalidInputError(str(path), expected="a folder that exists", found=f"no {folder}", remedy="Create it.")
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_NBYTES))
            probe.flush()
    except OSError as error:
        raise unwritable(path, error) from error


def _is_special(path: Path) -> bool:
    """True for what is there and no file or folder: a device, a pipe, a socket."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _write_into(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a pipe that nobody reads from is an error, not a wait
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _replace(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a regular file; FileExistsError if there is one, unless it is to be overwritten, which keeps its mode."""
    temporary = path.with_name(f".narrowcast-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite and path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        if overwrite or not _link(temporary, path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, path: Path) -> bool:
    """Make `path`, unless the file system has no links. Unlike a rename, a link never replaces another's file."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def unwritable(path: Path, error: OSError) -> InvalidInputError:
    """The error for a place that cannot be written."""
    return InvalidInputError(
        str(path),
        expected="a place that can be written",
        found=(error.strerror or str(error)).lower(),
        remedy="Make room or ask for permission there, or choose another place.",
    )


def check_report(path: Path | None, *, html: bool = False, num_words: int = 1) -> None:
    """InvalidInputError if no report can be written to `path`: only an earlier one of this command may be replaced.

    `num_words`: that the command's name has.
    """
    if path is None:
        return
    check_writable(path, overwrite=True)
    if path.is_file() and not _is_empty(path):
        found = "" if is_report(path, html=html) else "another file"
        words = slice(1, 1 + num_words)
        if not found and not html and (command := _command_of(path)[words]) not in ([], sys.argv[words]):
            found = f"a report of {' '.join(command)}"
        if found:
            raise InvalidInputError(
                str(path), expected="a new file or an earlier report", found=found, remedy="Choose another name."
            )


def is_report(path: Path, *, html: bool = False) -> bool:
    """True for a file that is there and that `write_report` wrote; `html`: for a page with `HTML_MARK`."""
    try:
        text = path.read_text(encoding="utf8")
        return HTML_MARK in text[:1000] if html else "narrowcast" in json.loads(text)
    except (OSError, ValueError, TypeError):
        return False


def _command_of(report: Path) -> list[str]:
    """The command line that wrote it."""
    return shlex.split(json.loads(report.read_text(encoding="utf8")).get("command", ""))


def _command_line() -> str:
    """The command that runs, as one would type it again."""
    return shlex.join(["narrowcast", *sys.argv[1:]])


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `report` as JSON, marked as ours, in place of an earlier one."""
    made = {"narrowcast": versions(), "date": f"{date.today()}", "command": _command_line()}
    text = json.dumps({**made, **report}, indent=2)
    write_new(path, f"{text}\n".encode(), overwrite=True)


def versions() -> dict[str, str | None]:
    """Installed versions by package; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
