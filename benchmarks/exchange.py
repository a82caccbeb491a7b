"""The time of an exchange between two ranks on loopback, by transport and size, and of a large sum beside gloo's.

usage: python benchmarks/exchange.py [--json FILE]

Each transport in blocks of its own, which take turns: another library's threads would be at work right after each of
its calls. A time is from when the last rank starts to when the last one is done; medians over all blocks, with the 99th
percentile. Then the sum of a 64 MB BF16 tensor: the group's own, and at 4.19 bits over our mesh, buffers reused.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import reporting
import torch
import torch.distributed as dist
from torch import Tensor

from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import Hops, Pending, all_reduce_steps
from narrowcast.launch import run
from narrowcast.perf.timing import Case, Span, interleaved, over_ranks, p99
from narrowcast.transport import TcpTransport, TorchDistributedTransport, Transport

SIZES = 256, 8192, 65536
BLOCKS, IN_A_BLOCK = 20, 100
SUM = 8192, 4096  # tokens and features: 64 MB
SUMS = 25


def on_rank() -> dict[str, list[Span]]:
    transports = {"tcp": TcpTransport(), "torch": TorchDistributedTransport()}
    found: dict[str, list[Span]] = {}
    for size in SIZES:
        for block in range(BLOCKS + 1):
            for name, transport in transports.items():
                dist.barrier()
                cases = {f"exchange {name} {size}": Case(exchange(transport, size, 10**6 * (block + 1)))}
                for key, spans in interleaved(cases, IN_A_BLOCK).items():
                    found.setdefault(key, []).extend(spans if block else [])
    x_RTE = torch.randn(2, *SUM, generator=torch.Generator().manual_seed(0)).bfloat16()
    hops = Hops((recipe("int4-feature").codec(Ranges.of(x_RTE)),))
    x_TE, buffer = x_RTE[dist.get_rank()].clone(), x_RTE[0].clone()
    del x_RTE
    sums = {
        "sum native": Case(lambda: dist.all_reduce(buffer)),
        "sum tcp": Case(coded(x_TE, hops, transports["tcp"])),
    }
    interleaved(sums, 2)
    return found | interleaved(sums, SUMS)


def exchange(transport: Transport, nbytes: int, tag: int) -> Callable[[], None]:
    payload, room = torch.ones(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    sends = [None if peer == transport.rank else payload for peer in range(2)]
    recvs = [None if peer == transport.rank else room for peer in range(2)]
    tags = iter(range(tag, tag + 10**6))
    return lambda: transport.exchange(sends, recvs, tag=next(tags)).wait()


def coded(x_TE: Tensor, hops: Hops, transport: Transport) -> Callable[[], Tensor]:
    y_TE = torch.empty_like(x_TE)
    return lambda: Pending(all_reduce_steps(x_TE, hops, transport, "one_shot", out=y_TE), transport).wait()


def rows() -> Iterator[dict[str, Any]]:
    by_rank = run(on_rank, 2)
    for key in by_rank[0]:
        times = over_ranks([found[key] for found in by_rank])
        yield {"case": key, "median_us": 1e6 * statistics.median(times), "p99_us": 1e6 * p99(times)}


def main() -> None:
    arguments = reporting.parser(__doc__).parse_args()
    table = []
    print("| case | median us | p99 us |\n| --- | ---: | ---: |")
    for row in rows():
        table.append(row)
        print("| {case} | {median_us:.1f} | {p99_us:.1f} |".format(**row), flush=True)
    reporting.write(arguments.json, rows=table)


if __name__ == "__main__":
    main()
