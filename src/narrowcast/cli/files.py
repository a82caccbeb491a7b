"""Text in, reports out."""

import itertools
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError
from narrowcast.plan import check_writable

DEFAULT_LENGTH = 256
HTML_MARK = '<meta name="generator" content="narrowcast">'


def sequences(tokenizer: Any, path: Path, *, length: int, limit: int | None = None) -> list[Tensor]:
    """Token ids [1, T] of the documents in `path` (split by form feeds), in pieces of `length` tokens at most.

    A scrap at a document's end (less than half of `length`) is left out.
    """
    if not path.is_file():
        raise InvalidInputError(str(path), expected="a text file", found="no such file", remedy="Pass one with --text.")
    found = list(itertools.islice(_pieces(tokenizer, path, length), limit))
    if not found:
        raise InvalidInputError(
            str(path), expected="at least two tokens of text", found="none", remedy="Pass another file."
        )
    return found


def _pieces(tokenizer: Any, path: Path, length: int) -> Iterator[Tensor]:
    try:
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            str(path), expected="UTF-8 text", found=f"bytes that are not ({error.reason})", remedy="Convert it."
        ) from error
    for document in text.split("\f"):
        ids = torch.tensor([tokenizer(document, verbose=False).input_ids], dtype=torch.long)
        first, *others = ids.split(length, dim=1)
        yield from (piece for piece in (first, *others) if piece.shape[1] >= (2 if piece is first else length // 2))


def check_report(path: Path | None, *, html: bool = False) -> None:
    """InvalidInputError if no report can be written to `path`: only an earlier one, of its kind, may be replaced."""
    if path is None:
        return
    check_writable(path, overwrite=True)
    if path.exists() and not (_is_html_report(path) if html else _is_report(path)):
        raise InvalidInputError(
            str(path), expected="a new file or an earlier report", found="another file", remedy="Choose another name."
        )


def _is_report(path: Path) -> bool:
    try:
        return "narrowcast" in json.loads(path.read_text(encoding="utf8"))
    except (ValueError, TypeError):
        return False


def _is_html_report(path: Path) -> bool:
    with path.open("rb") as file:
        return HTML_MARK.encode() in file.read(1000)


def read_report(path: Path, *, remedy: str) -> dict[str, Any]:
    """The figures of an earlier report; InvalidInputError, with `remedy`, if `path` is none."""
    if not path.is_file() or not _is_report(path):
        found = "another file" if path.exists() else "no such file"
        raise InvalidInputError(str(path), expected="an earlier report", found=found, remedy=remedy)
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return report


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `report` as JSON, marked as ours."""
    from narrowcast.cli.doctor import versions

    text = json.dumps({"narrowcast": versions(), "date": f"{date.today()}", **report}, indent=2)
    write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write `text`, or leave what was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf8")
    temporary.replace(path)
