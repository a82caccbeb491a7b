"""The speed of a codec's kernels, against copying the same tensor."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from narrowcast.codecs import Codec, Ranges, kernels, recipe
from narrowcast.errors import NarrowcastError
from narrowcast.perf.sizes import DTYPE, shape_of
from narrowcast.perf.timing import Case, interleaved, rounds_within, seconds

OPS = "encode", "decode", "decode_sum"
NUM_SOURCES = 2
SIZES = ("4M",)
SECONDS = 0.5  # a codec
# One of each family.
CODECS = (
    "bf16",
    "int4-feature",
    "int8-feature",
    "int4-group128",
    "int2-group32-spike",
    "mxfp4",
    "nvfp4",
)
MEMCPY = "memcpy", ""

Operation = Callable[[], Tensor]


def rows(codec: str, nbytes: int, *, seconds_each: float = SECONDS) -> Iterator[dict[str, Any]]:
    """A row for each operation on a BF16 tensor [T, E] of about `nbytes` and each path of kernels, on one thread.

    `gbps`: bytes of the tensor a second, not of the payload. `memcpy_gbps`: of copying it, in the same rounds.
    """
    shape = shape_of(nbytes)
    x_RTE = torch.randn(NUM_SOURCES, *shape, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    operations = _operations(recipe(codec).codec(Ranges.of(x_RTE)), x_RTE)
    _check(codec, operations)
    room = torch.empty_like(x_RTE[0])
    cases = {MEMCPY: Case(lambda: room.copy_(x_RTE[0]))}
    for path in kernels.available():
        cases |= {(op, path): Case(_through(path, operation)) for op, operation in operations.items()}
    with _one_thread():
        spans = interleaved(cases, rounds_within(seconds_each, cases))
    rate = {name: room.nbytes / statistics.median(seconds(each)) / 1e9 for name, each in spans.items()}
    for op, path in (name for name in cases if name != MEMCPY):
        yield {
            "codec": codec,
            "op": op,
            "device": "cpu",
            "path": path,
            "shape": list(shape),
            "gbps": rate[op, path],
            "memcpy_gbps": rate[MEMCPY],
        }


def _operations(codec: Codec, x_RTE: Tensor) -> dict[str, Operation]:
    """The codec's operations, each into a buffer of its own that is there already."""
    payloads_RTB = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(x_RTE)])
    payload_TB, value_TE, sum_TE = (torch.empty_like(each[0]) for each in (payloads_RTB, x_RTE, x_RTE))
    return {
        "encode": lambda: codec.encode(x_RTE[0], source=0, out=payload_TB),
        "decode": lambda: codec.decode(payloads_RTB[0], source=0, out=value_TE),
        "decode_sum": lambda: codec.decode_sum(payloads_RTB, out=sum_TE),
    }


def _through(path: str, operation: Operation) -> Operation:
    def run() -> Tensor:
        with kernels.forced(path):
            return operation()

    return run


def _check(codec: str, operations: dict[str, Operation]) -> None:
    """Every path must give the reference's bytes: it is not worth timing otherwise."""
    for op, operation in operations.items():
        expected = _through("reference", operation)().clone()
        for path in kernels.available():
            found = _through(path, operation)()
            if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
                raise NarrowcastError(f"{codec}: {op} by {path} kernels differs from the reference; please report it")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
