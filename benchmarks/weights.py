"""Products of a few tokens with matrices in few bits, against the rate at which memory can be read and PyTorch.

usage: python benchmarks/weights.py [--threads N ...] [--tokens N ...] [--rows N --columns N] [--rounds N] [--json FILE]

ms of a product with a random matrix [rows, columns], the least and the median over the rounds, in which all ways take
turns; matrices rotate through more memory than caches hold. `share`: of the rate at which as many threads read memory
in the same rounds; both by their least times. `error`: of the result, relative, from Gaussian activations.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import reporting
import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.aligned import aligned
from narrowcast.codecs.kernels import cpu
from narrowcast.perf.machine import machine
from narrowcast.weights.arena import Arena
from narrowcast.weights.formats import Q4_0, Q4_1, Q8_0, TERNARY, GroupedCodes, WeightFormat, w4a16
from narrowcast.weights.packed import PackedMatrix
from narrowcast.weights.products import multiply, multiply_dense

FORMATS = (Q4_0, Q4_1, Q8_0, TERNARY, w4a16(64), w4a16(128))
ROTATING = 160 << 20  # bytes
READ = "memory, read alone"


@dataclass
class Way:
    """Something timed: `run` on the next of its matrices, of `nbytes` each."""

    name: str
    num_tokens: int
    num_threads: int
    nbytes: int
    run: Callable[[], object]
    error: float | None = None
    times: list[float] = field(default_factory=list)

    def time(self) -> None:
        torch.set_num_threads(self.num_threads)
        start = time.perf_counter()
        self.run()
        self.times.append(time.perf_counter() - start)


def random_codes(form: WeightFormat, num_rows: int, num_columns: int) -> GroupedCodes:
    most = 3 if form.is_ternary else 1 << form.num_bits
    codes = torch.randint(0, most, (num_rows, num_columns), dtype=torch.uint8)
    shape = form.scales_shape(num_rows, num_columns)
    scales = torch.rand(shape).mul(0.01).to(form.scale_dtypes[0])
    points = torch.randint(0, 16, shape, dtype=torch.uint8)
    offsets = {"middle": None, "minimum": scales * -8, "zero_point": points}[form.offset]
    return GroupedCodes(form, codes, scales, offsets)


def ways(asked: Any) -> Iterator[Way]:
    sizes, arena = (asked.rows, asked.columns), Arena()
    settings = list(itertools.product(asked.threads, asked.tokens))
    for form in FORMATS:
        codes = random_codes(form, *sizes)
        first = PackedMatrix.pack(codes)
        copies = [PackedMatrix.joined([first], arena)[0] for _ in range(ROTATING // first.nbytes + 1)]
        exact = codes.dequantized().double()
        for num_threads, num_tokens in settings:
            x_TK = torch.randn(num_tokens, asked.columns).bfloat16()
            error = relative(multiply(first, x_TK.float()), x_TK.double() @ exact.T)
            run = partial(next_of, multiply, itertools.cycle(copies), x_TK)
            yield Way(form.name, num_tokens, num_threads, first.nbytes, run, error)
    nbytes = 2 * asked.rows * asked.columns
    dense = [arena.room(nbytes).view(torch.bfloat16).view(sizes).normal_() for _ in range(ROTATING // nbytes + 1)]
    ours = partial(multiply_dense, num_tokens=1)  # whatever their number
    for name, product in {"bf16": ours, "bf16, PyTorch's": flipped}.items():
        for num_threads, num_tokens in settings:
            x_TK, turn = torch.randn(num_tokens, asked.columns).bfloat16(), itertools.cycle(dense)
            yield Way(name, num_tokens, num_threads, nbytes, partial(next_of, product, turn, x_TK))
    memory = arena.room(ROTATING).fill_(1)
    for num_threads in asked.threads:
        run = partial(read, memory, num_threads)
        yield Way(READ, 0, num_threads, ROTATING, run)


def next_of(product: Callable[..., Tensor], turn: Iterator[Any], x_TK: Tensor) -> Tensor:
    return product(next(turn), x_TK)


def read(memory: Tensor, num_threads: int) -> None:
    assert cpu.native is not None, "this times the compiled kernels"
    cpu.native.read_memory(memory.data_ptr(), memory.nbytes, num_threads)


def flipped(weight_NK: Tensor, x_TK: Tensor) -> Tensor:
    return functional.linear(x_TK, weight_NK)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def rows(found: Sequence[Way]) -> Iterator[dict[str, Any]]:
    rates = {way.num_threads: way.nbytes / min(way.times) for way in found if way.name == READ}
    for way in found:
        rate = way.nbytes / min(way.times)
        yield {
            "way": way.name,
            "tokens": way.num_tokens,
            "threads": way.num_threads,
            "least_ms": min(way.times) * 1e3,
            "median_ms": statistics.median(way.times) * 1e3,
            "gb_per_s": rate / 1e9,
            "share": rate / rates[way.num_threads],
            "error": way.error,
        }


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 512], metavar="N")
    parser.add_argument("--rows", type=int, default=4992)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    found = list(ways(asked))
    for round in range(asked.rounds + 1):
        for way in found:
            for _ in range(1 if way.num_tokens > 64 or way.name == READ else 5):
                way.time()
            if not round:  # warmed up
                way.times.clear()
    table = list(rows(found))
    cells = ([f"{each:.4g}" if isinstance(each, float) else str(each) for each in row.values()] for row in table)
    print(aligned([list(table[0]), *cells]))
    matrix = {"rows": asked.rows, "columns": asked.columns}
    reporting.write(asked.json, machine=machine(), matrix=matrix, rounds=asked.rounds, rows=table)


if __name__ == "__main__":
    main()
