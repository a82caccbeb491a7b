"""The kernels there are, by operator and device, and which of them run.

A codec has four operators, each with a reference in plain PyTorch that runs on any device:

    encode(codec, x_TE, source, out_TB, stats)
    encode_with_residue(codec, x_TE, residue_TE, source, out_TB, stats)
    decode_sum(codec, payloads_RTB, first_source, out_TE)
    recode(codec, payloads_RTB, reduced, num_features, out_TB, stats)

`KERNELS` holds those that are faster somewhere, functions of the same arguments that give the same bits. Shapes and
dtypes are checked before they are called, and all tensors are plain ones of their device whose rows are contiguous, so
that addresses tell all; others (stand-ins for tensors, strided rows) go to the reference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from narrowcast.codecs.kernels import cpu, reference
from narrowcast.errors import InvalidInputError

if TYPE_CHECKING:
    from narrowcast.codecs.base import Codec

Kernel = Callable[..., None]
Note = Callable[[str, Kernel], Kernel]

REFERENCE = "reference"

REFERENCES: dict[str, Kernel] = {
    "encode": reference.encode,
    "encode_with_residue": reference.encode_with_residue,
    "decode_sum": reference.decode_sum,
    "recode": reference.recode,
}

# By the format (`Codec.id`) of what is encoded or decoded, operator, and type of device.
KERNELS: dict[tuple[str, str, str], Kernel] = {
    (form, operator, "cpu"): kernel
    for operator, kernel in (
        ("encode", cpu.encode),
        ("encode_with_residue", cpu.encode_with_residue),
        ("decode_sum", cpu.decode_sum),
        ("recode", cpu.recode),
    )
    for form in (cpu.FORMS if cpu.native else ())
}

_forced_reference = False
_note: Note | None = None


def find(codec: "Codec", operator: str, given: Tensor, out: Tensor, stats: Tensor | None = None) -> Kernel:
    """The fastest kernel of the codec's operator for these tensors."""
    on_cpu = given.is_cpu
    plain = type(given) is type(out) is Tensor and out.is_cpu is on_cpu and given.stride(-1) == out.stride(-1) == 1
    if _forced_reference or not plain or (stats is not None and not _is_alike(stats, on_cpu)):
        kernel = REFERENCES[operator]
    else:
        kernel = KERNELS.get((codec.id, operator, "cpu" if on_cpu else given.device.type)) or REFERENCES[operator]
    return kernel if _note is None else _note(operator, kernel)


def _is_alike(stats: Tensor, on_cpu: bool) -> bool:
    return type(stats) is Tensor and stats.is_cpu is on_cpu and stats.stride(-1) == 1


def available() -> list[str]:
    """Paths on the CPU from the slowest to the fastest: "reference" and, if compiled, "portable", "avx2", ..."""
    return [REFERENCE, *(cpu.native.paths() if cpu.native else [])]


def selected() -> str:
    """The path in use on the CPU."""
    return REFERENCE if cpu.native is None or _forced_reference else cpu.native.path()


def reference_is_forced() -> bool:
    """True inside of `forced("reference")`."""
    return _forced_reference


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Run on `path` inside the context, in all threads of this process; InvalidInputError if it is not available.

    "reference" runs the references on every device.
    """
    global _forced_reference
    if path not in available():
        raise InvalidInputError(
            "kernels", expected=f"one of {', '.join(available())}", found=path, remedy="See `narrowcast doctor`."
        )
    before, path_before = _forced_reference, cpu.native.path() if cpu.native else None
    try:
        _forced_reference = path == REFERENCE
        if cpu.native and path != REFERENCE:
            cpu.native.use_path(path)
        yield
    finally:
        _forced_reference = before
        if cpu.native:
            cpu.native.use_path(path_before)


@contextmanager
def noted(note: Note) -> Iterator[None]:
    """Let `note` see each kernel that is found inside the context, in any thread, and choose what runs in its place."""
    global _note
    before, _note = _note, note
    try:
        yield
    finally:
        _note = before


__all__ = ["KERNELS", "REFERENCE", "available", "find", "forced", "noted", "reference_is_forced", "selected"]
