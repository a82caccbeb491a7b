"""The time of a sum over ranks, by codec, algorithm, transport, size and link."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import ALGORITHMS, Hops, Pending, all_reduce_steps, checked_hops, choose, simulate
from narrowcast.collectives.base import Traffic
from narrowcast.collectives.reduce import chunks_of
from narrowcast.errors import NarrowcastError
from narrowcast.launch import Link, run
from narrowcast.perf.sizes import DTYPE, parse_sizes, shape_of
from narrowcast.perf.sockets import SocketMesh
from narrowcast.perf.timing import Case, Span, interleaved, over_ranks, p99, rounds_within
from narrowcast.transport import DEFAULT_TIMEOUT_S, TcpTransport, TorchDistributedTransport, Transport
from narrowcast.transport.torch_distributed import hurry_engine

TRANSPORTS: dict[str, Callable[[], Transport]] = {"torch": TorchDistributedTransport, "tcp": TcpTransport}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Measurements: every codec with every algorithm, transport and size in bytes, about `seconds` a size.

    `timeout_s`: until a rank is lost.
    """

    codecs: Sequence[str] = ("bf16", "int4-feature")
    algorithms: Sequence[str] = tuple(ALGORITHMS)
    transports: Sequence[str] = ("tcp",)
    sizes: Sequence[int] = tuple(parse_sizes(["1K..64M"]))
    seconds: float = 1.0
    timeout_s: float = DEFAULT_TIMEOUT_S


DEFAULT = Sweep()


class Key(NamedTuple):
    """The case of a row.

    `wire_bytes`: that rank 0 sends. `num_latencies`: exchanges that wait for the one before, the first included.
    """

    transport: str
    codec: str
    algorithm: str
    nbytes: int
    wire_bytes: int
    num_latencies: int


def rows(sweep: Sweep, world_size: int, link: Link | None) -> Iterator[dict[str, Any]]:
    """A row for each case, of rank 0: baselines first, each size's cases in interleaved rounds."""
    by_rank = run(_on_rank, world_size, sweep, link=link, timeout_s=sweep.timeout_s)
    keys = (list(measured) for measured in by_rank)
    for key, *others in zip(*keys, strict=True):
        spans = [by_rank[rank][own] for rank, own in enumerate([key, *others])]
        times = over_ranks(spans)
        yield {
            "transport": key.transport,
            "codec": key.codec,
            "algorithm": key.algorithm,
            "world_size": world_size,
            "nbytes": key.nbytes,
            "link": None if link is None else str(link),
            "median_us": statistics.median(times) * 1e6,
            "p99_us": p99(times) * 1e6,
            "wire_bytes": key.wire_bytes,
            "limit_us": None if link is None else limit_s(link, key) * 1e6,
        }


def limit_s(link: Link, key: Key) -> float:
    """Seconds that the link alone takes: a delay for each exchange that waits for the one before, and the bytes."""
    return link.transfer_s(key.wire_bytes) + (key.num_latencies - 1) * link.delay_s


def _on_rank(sweep: Sweep) -> dict[Key, list[Span]]:
    hurry_engine()
    mesh = SocketMesh()
    transports = {name: TRANSPORTS[name]() for name in sweep.transports}
    measured: dict[Key, list[Span]] = {}
    for size in sweep.sizes:
        cases = _cases(sweep, transports, mesh, shape_of(size))
        num_rounds = torch.tensor(rounds_within(sweep.seconds, cases))
        dist.broadcast(num_rounds, 0)
        measured |= interleaved(cases, int(num_rounds))
    mesh.close()
    return measured


def _cases(sweep: Sweep, transports: dict[str, Transport], mesh: SocketMesh, shape: tuple[int, int]) -> dict[Key, Case]:
    """Native sums, sums by each codec, and first of all the exchange of as many bytes by plain sockets."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x_RTE = torch.randn(world_size, *shape, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    cases = _native(x_RTE, rank)
    nbytes = x_RTE[0].nbytes
    for preset in sweep.codecs:
        codecs = recipe(preset).codec(Ranges.of(x_RTE)), recipe(preset).codec(Ranges.of(x_RTE.float().sum(0, True)))
        hops = checked_hops(codecs, world_size)
        for algorithm in dict.fromkeys(choose(each, hops, *shape, world_size) for each in sweep.algorithms):
            expected = simulate.all_reduce(x_RTE.unbind(), codec=codecs, algorithm=algorithm)
            for name, transport in transports.items():
                cost = _checked(x_RTE[rank], hops, transport, algorithm, expected)
                cases[Key(name, preset, algorithm, nbytes, *cost)] = Case(_sum(x_RTE[rank], hops, transport, algorithm))
    return _raw(cases, mesh, nbytes) | cases


def _raw(cases: Iterable[Key], mesh: SocketMesh, nbytes: int) -> dict[Key, Case]:
    """Exchanges of as many bytes as rank 0 sends in each case: other ranks' shares may differ by a few."""
    others = dist.get_world_size() - 1
    sizes = [list(dict.fromkeys(-(-key.wire_bytes // others) for key in cases))]
    dist.broadcast_object_list(sizes, 0)
    return {
        Key("socket", "raw", "exchange", nbytes, size * others, 1): Case(partial(mesh.exchange, size))
        for size in sizes[0]
    }


def _native(x_RTE: Tensor, rank: int) -> dict[Key, Case]:
    """The group's own all_reduce: a ring sends each share on world_size - 1 times, before and after it is summed."""
    buffer, others = torch.empty_like(x_RTE[rank]), len(x_RTE) - 1
    case = Case(lambda: dist.all_reduce(buffer), prepare=lambda: buffer.copy_(x_RTE[rank]))
    case.timed()
    if not torch.allclose(buffer.float(), x_RTE.float().sum(0), rtol=2**-7, atol=2**-5):
        raise NarrowcastError("the group's own all_reduce gives another sum; please report it")
    return {Key("torch", "native", "native", buffer.nbytes, 2 * others * buffer.nbytes // len(x_RTE), 2 * others): case}


def _sum(
    x_TE: Tensor, hops: Hops, transport: Transport, algorithm: str, sent: list[Traffic] | None = None
) -> Callable[[], Tensor]:
    """A sum into a buffer that is there already, as the native one has it."""
    count, y_TE = None if sent is None else sent.append, torch.empty_like(x_TE)
    return lambda: Pending(all_reduce_steps(x_TE, hops, transport, algorithm, out=y_TE), transport, count).wait()


def _checked(x_TE: Tensor, hops: Hops, transport: Transport, algorithm: str, expected: Tensor) -> tuple[int, int]:
    """The bytes and the latencies of a sum (`Key`); NarrowcastError if its bits are not those of the twin."""
    sent: list[Traffic] = []
    found = _sum(x_TE, hops, transport, algorithm, sent)()
    if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
        raise NarrowcastError(f"{algorithm} differs from its twin on rank {transport.rank}; please report it")
    num_chunks = len(chunks_of(hops, len(x_TE), x_TE.shape[1], transport.world_size, transport.chunk_values))
    return sum(each.nbytes for each in sent), len(sent) // num_chunks
