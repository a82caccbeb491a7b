"""Which kernels this machine can run on CPU tensors, and which it does run.

"reference" are the operators in plain PyTorch; the others are C++ (csrc/), alike to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from narrowcast.codecs.kernels import cpu
from narrowcast.errors import InvalidInputError

REFERENCE = "reference"


def available() -> list[str]:
    """Paths from the slowest to the fastest: "reference" and, where the compiled module is there, "portable", ..."""
    return [REFERENCE, *(cpu.native.paths() if cpu.native else [])]


def selected() -> str:
    """The path in use."""
    return cpu.native.path() if cpu.native and cpu.enabled else REFERENCE


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Run on `path` inside the context, in all threads of this process; InvalidInputError if it is not available."""
    before = selected()
    _select(path)
    try:
        yield
    finally:
        _select(before)


def _select(path: str) -> None:
    if path not in available():
        raise InvalidInputError(
            "kernels", expected=f"one of {', '.join(available())}", found=path, remedy="See `narrowcast doctor`."
        )
    cpu.enabled = path != REFERENCE
    if cpu.native and cpu.enabled:
        cpu.native.use_path(path)


__all__ = ["REFERENCE", "available", "forced", "selected"]
