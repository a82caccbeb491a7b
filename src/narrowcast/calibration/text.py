"""Text as sequences of token ids."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError

DEFAULT_LENGTH = 256


def sequences(tokenizer: Any, path: Path, *, length: int, limit: int | None = None) -> list[Tensor]:
    """Token ids [1, T] of the documents in `path` (split by form feeds), in pieces of `length` tokens at most.

    A scrap at a document's end (less than half of `length`) is left out, and so is a blank document.
    """
    found = list(itertools.islice(_pieces(tokenizer, path, length), limit))
    if not found:
        raise InvalidInputError(
            str(path), expected="at least two tokens of text", found="none", remedy="Pass another file."
        )
    return found


def documents(path: Path) -> list[str]:
    """The documents in a text file, split by form feeds, without blank ones; InvalidInputError for other files."""
    if not path.is_file():
        there = "a folder" if path.is_dir() else "no such file"
        raise InvalidInputError(str(path), expected="a text file", found=there, remedy="Pass one with --text.")
    try:
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            str(path), expected="UTF-8 text", found=f"bytes that are not ({error.reason})", remedy="Convert it."
        ) from error
    return list(filter(str.strip, text.split("\f")))


def _pieces(tokenizer: Any, path: Path, length: int) -> Iterator[Tensor]:
    for document in documents(path):
        ids = torch.tensor([tokenizer(document, verbose=False).input_ids], dtype=torch.long)
        first, *others = ids.split(length, dim=1)
        yield from (piece for piece in (first, *others) if piece.shape[1] >= (2 if piece is first else length // 2))
