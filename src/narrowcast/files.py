"""Writing files: whole or not at all, and never over what a user made unless asked."""

import importlib.metadata
import json
import os
import platform
import secrets
from datetime import date
from pathlib import Path
from typing import Any

from narrowcast.errors import InvalidInputError

HTML_MARK = '<meta name="generator" content="narrowcast">'
PACKAGES = (
    *("narrowcast", "torch", "numpy", "safetensors"),
    *("transformers", "accelerate", "typer", "rich", "matplotlib", "lm-eval"),
)


def write_new(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write `data` whole or not at all. InvalidInputError if `path` exists and `overwrite` is not set."""
    check_writable(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite or not _link(temporary, path):
            temporary.replace(path)
    except FileExistsError:
        check_writable(path, overwrite=overwrite)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """InvalidInputError if `path` exists and may not be replaced, or has no folder: before the work, not after."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise InvalidInputError(
            str(path),
            expected="a new file",
            found="a folder" if path.is_dir() else "a file that exists",
            remedy="Choose another name" + ("." if path.is_dir() else ", or pass overwrite=True (--overwrite)."),
        )
    if not path.parent.is_dir():
        raise InvalidInputError(
            str(path), expected="a folder that exists", found=f"no {path.parent}", remedy="Create it first."
        )


def _link(source: Path, path: Path) -> bool:
    """Make `path`, unless the file system has no links. Unlike a rename, a link never replaces another's file."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def check_report(path: Path | None, *, html: bool = False) -> None:
    """InvalidInputError if no report can be written to `path`: only an earlier one, of its kind, may be replaced."""
    if path is None:
        return
    check_writable(path, overwrite=True)
    if path.exists() and not is_report(path, html=html):
        raise InvalidInputError(
            str(path), expected="a new file or an earlier report", found="another file", remedy="Choose another name."
        )


def is_report(path: Path, *, html: bool = False) -> bool:
    """True for a file that is there and that `write_report` wrote; `html`: for a page with `HTML_MARK`."""
    try:
        text = path.read_text(encoding="utf8")
        return HTML_MARK in text[:1000] if html else "narrowcast" in json.loads(text)
    except (OSError, ValueError, TypeError):
        return False


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `report` as JSON, marked as ours, in place of an earlier one."""
    text = json.dumps({"narrowcast": versions(), "date": f"{date.today()}", **report}, indent=2)
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
