"""Sizes of tensors as they are written, and the shapes that stand for them."""

import re
from collections.abc import Sequence

import torch

from narrowcast.errors import InvalidInputError

DTYPE, NUM_FEATURES = torch.bfloat16, 4096
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
FACTOR = 4  # between the sizes of a range


def parse_sizes(texts: Sequence[str]) -> list[int]:
    """Bytes of sizes such as "64K" and of ranges, whose sizes are each FACTOR times the one before.

    InvalidInputError for what is no size, and where a range has none.

    >>> parse_sizes(["1K..64K", "2M"])
    [1024, 4096, 16384, 65536, 2097152]
    """
    sizes = set()
    for text in texts:
        first, *rest = map(_nbytes, text.split("..", 1))
        last = rest[0] if rest else first
        while first <= last:
            sizes.add(first)
            first *= FACTOR
    if not sizes:
        raise InvalidInputError("--size", expected="SMALLEST..LARGEST", found=", ".join(texts), remedy="Swap them.")
    return sorted(sizes)


def written(nbytes: int) -> str:
    """Bytes, in the largest unit that divides them.

    >>> written(65536), written(1000)
    ('64K', '1000')
    """
    unit = next(unit for unit in reversed(UNITS) if nbytes % UNITS[unit] == 0)
    return f"{nbytes // UNITS[unit]}{unit}"


def shape_of(nbytes: int) -> tuple[int, int]:
    """Tokens and features of a BF16 tensor of about `nbytes`.

    >>> shape_of(1 << 22), shape_of(1 << 10)
    ((512, 4096), (1, 512))
    """
    row_nbytes = NUM_FEATURES * DTYPE.itemsize
    return (1, max(nbytes // DTYPE.itemsize, 1)) if nbytes < row_nbytes else (nbytes // row_nbytes, NUM_FEATURES)


def _nbytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.upper(), re.ASCII)
    if found is None or float(found[1]) == 0:
        raise InvalidInputError("--size", expected="a number, or one with K, M or G", found=text, remedy="Try 64K.")
    return round(float(found[1]) * UNITS[found[2]])
