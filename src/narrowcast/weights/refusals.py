"""Words for files that cannot be used."""

from pathlib import Path

from narrowcast.errors import InvalidInputError


def broken(path: Path, expected: object, found: object) -> InvalidInputError:
    """The error for a file that is not what it says it is."""
    return InvalidInputError(f"file {path}", expected=expected, found=found, remedy="Copy or download it again.")


def unserved(path: Path, expected: object, found: object, remedy: str) -> InvalidInputError:
    """The error for a sound model whose weights nothing here reads."""
    return InvalidInputError(f"model {path}", expected=expected, found=found, remedy=remedy)
