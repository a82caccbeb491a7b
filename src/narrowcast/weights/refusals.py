"""Words for files that cannot be used. Names in them are taken from those files, so they may be anything."""

from pathlib import Path

from narrowcast.errors import InvalidInputError

MAX_LETTERS = 300


def broken(path: Path, expected: object, found: object) -> InvalidInputError:
    """The error for a file that is not what it says it is."""
    return InvalidInputError(
        f"file {path}", expected=_line(expected), found=_line(found), remedy="Copy or download it again."
    )


def unserved(path: Path, expected: object, found: object, remedy: str) -> InvalidInputError:
    """The error for a sound model whose weights nothing here reads."""
    return InvalidInputError(f"model {path}", expected=_line(expected), found=_line(found), remedy=remedy)


def _line(words: object) -> str:
    """One line that can be printed, of any length or content."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(words))
    return shown if len(shown) <= MAX_LETTERS else f"{shown[:MAX_LETTERS]}..."
