"""Small sums of a plan: from the second one of a kind on in one native call, with the bits of the steps."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models import calibrated
from narrowcast import PeerLostError
from narrowcast.codecs import kernels
from narrowcast.collectives.one_call import MAX_NBYTES, OneCall
from narrowcast.plan.chains import Chains
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.runtime.small_sums import SmallSums
from narrowcast.transport import TcpTransport
from ranks import Ranks
from transports import needs_mesh

pytestmark = needs_mesh
Pools = Callable[[int], Ranks]

CPU, E, ROUNDS = torch.device("cpu"), 96, 4
CODECS = "bf16", "int4-feature", "feature(bits=3)", "int4-group32-sym", "mxfp4", "fp8", "allocated(bits=3)"


def values(world_size: int, num_tokens: int, dtype: torch.dtype, round: int) -> list[Tensor]:
    """With a value far out and one that is not finite, now and then."""
    x_RTE = torch.randn(world_size, num_tokens, E, generator=torch.Generator().manual_seed(round))
    x_RTE[0, 0, 3] *= 30
    x_RTE[-1, -1, 5] = float("nan") if round == 2 else 1.0
    return list(x_RTE.to(dtype))


def sites(codec: str, world_size: int, algorithm: str) -> Sites:
    pair = calibrated(codec, torch.stack(values(world_size, 8, torch.float32, 0)))
    return Sites({"a": pair, "b": pair}, (), algorithm, CPU, chains=Chains(chains=(("a", "b"),)))


Case = tuple[str, str, int, torch.dtype]
Found = list[tuple[Tensor, Tensor]]


def sums(wires: Any, case: Case, world_size: int, rank: int | None) -> tuple[Found, list[int]]:
    """Sums of two sites, of which the first leaves its loss to the second, round by round; and what was counted."""
    _, _, num_tokens, dtype = case
    found = []
    for round in range(ROUNDS):
        given = values(world_size, num_tokens, dtype, round)
        for site in "ab":
            residue = wires.residue(site, num_tokens, E, CPU)
            total = wires.sum(given if rank is None else [given[rank]], site, residue)
            found.append((total, residue.clone()))
    report = wires.sites.report()
    return found, [report.num_saturated, report.num_non_finite, report.num_guarded]


def on_rank(case: Case) -> tuple[Found, list[int], int]:
    """How many sums were made in one call, too."""
    codec, algorithm, _, _ = case
    transport, calls, run = TcpTransport(), [], OneCall.run
    OneCall.run = lambda self, *args: (calls.append(1), run(self, *args))[1]  # type: ignore[assignment, method-assign]
    try:
        wires = Communicator(sites(codec, transport.world_size, algorithm), tp=transport, pp=None)
        return *sums(wires, case, transport.world_size, transport.rank), len(calls)
    finally:
        OneCall.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("codec", CODECS)
def test_one_call_has_the_bits_of_the_twin(
    ranks: Pools, codec: str, algorithm: str, num_tokens: int, world_size: int
) -> None:
    """Sums, what each leaves to the next one, and what is counted."""
    check(ranks, codec, algorithm, num_tokens, world_size)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_eight_ranks(ranks: Pools, algorithm: str) -> None:
    """Of four tokens, so that two_shot shares out features."""
    check(ranks, "feature(bits=4, outliers=0)", algorithm, 4, 8)


def check(ranks: Pools, codec: str, algorithm: str, num_tokens: int, world_size: int) -> None:
    for dtype in torch.bfloat16, torch.float32:
        case = codec, algorithm, num_tokens, dtype
        simulated = Simulator(sites(codec, world_size, algorithm), world_size)
        expected, counted = sums(simulated, case, world_size, None)
        per_rank = ranks(world_size).run(on_rank, case)
        assert [sum(each) for each in zip(*(counts for _, counts, _ in per_rank), strict=True)] == counted
        for rank, (found, _, num_calls) in enumerate(per_rank):
            assert num_calls == 2 * (ROUNDS - 1)
            for (total, residue), (expected_total, expected_residue) in zip(found, expected, strict=True):
                assert torch.equal(total.view(torch.uint8), expected_total.view(torch.uint8))
                assert torch.equal(residue[0], expected_residue[rank])


def other_ways() -> dict[str, int]:
    """How many sums out of three were made in one call."""
    transport, calls, run = TcpTransport(), [], OneCall.run
    OneCall.run = lambda self, *args: (calls.append(1), run(self, *args))[1]  # type: ignore[assignment, method-assign]
    found = {}

    def three(name: str, num_tokens: int = 1, **options: Any) -> None:
        calls.clear()
        pair = calibrated("int4-feature", torch.stack(values(2, 8, torch.float32, 0)))
        wires = Communicator(Sites({"a": pair}, (), "one_shot", CPU, **options), tp=transport, pp=None)
        for _ in range(3):
            wires.sum([values(2, num_tokens, torch.bfloat16, 0)[transport.rank]], "a")
        found[name] = len(calls)

    try:
        three("small")
        three("timed", timed=True)
        three("large", MAX_NBYTES // 2 // E + 1)
        with kernels.forced("reference"):
            three("reference")
    finally:
        OneCall.run = run  # type: ignore[method-assign]
    return found


def test_who_wants_the_steps_has_them(ranks: Pools) -> None:
    for found in ranks(2).run(other_ways):
        assert found == {"small": 2, "timed": 0, "large": 0, "reference": 0}


@pytest.fixture
def three() -> Iterator[Ranks]:
    pool = Ranks(3)
    pool.run(int)
    yield pool
    pool.close()


def add_up_until_lost(marks: Path, timeout_s: float) -> tuple[int, ...]:
    transport = TcpTransport(timeout_s=timeout_s)
    wires = Communicator(sites("int4-feature", 3, "two_shot"), tp=transport, pp=None)
    x = values(3, 4, torch.bfloat16, 0)[transport.rank]
    for round in range(1 << 30):
        try:
            wires.sum([x], "a")
        except PeerLostError as error:
            assert not wires._small_sums._calls, "nothing that bytes may still travel into is used again"
            return error.ranks
        if round == 100:
            (marks / f"{transport.rank}").touch()
    return ()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named(three: Ranks, tmp_path: Path, how: signal.Signals) -> None:
    three.start(add_up_until_lost, tmp_path, 3.0)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(three.processes[1].pid, how)
    assert [three.result(rank) for rank in (0, 2)] == [(1,), (1,)]


def interrupted() -> bool:
    """Rank 0 waits for a sum that rank 1 is late for, and is interrupted; then both make it."""
    transport = TcpTransport()
    wires = Communicator(sites("int4-feature", 2, "one_shot"), tp=transport, pp=None)
    x, came = values(2, 1, torch.bfloat16, 0)[transport.rank], False
    wires.sum([x], "a")
    if transport.rank == 0:
        threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            wires.sum([x], "a")
        except KeyboardInterrupt:
            came = not wires._small_sums._calls
    dist.barrier()
    if transport.rank == 1:
        wires.sum([x], "a")
        came = True
    wires.sum([x], "a")
    return came


def test_ctrl_c_while_waiting(ranks: Pools) -> None:
    assert ranks(2).run(interrupted) == [True, True]


def test_sums_of_other_sizes_have_calls_of_their_own(ranks: Pools) -> None:
    for found in ranks(2).run(sizes_in_turn):
        assert all(found)


def sizes_in_turn() -> list[bool]:
    transport = TcpTransport()
    wires = Communicator(sites("int4-feature", 2, "one_shot"), tp=transport, pp=None)
    twin, found = Simulator(sites("int4-feature", 2, "one_shot"), 2), []
    for round in range(3):
        for num_tokens in (1, 4, 2):
            given = values(2, num_tokens, torch.bfloat16, round)
            total = wires.sum([given[transport.rank]], "a")
            found.append(torch.equal(total.view(torch.uint8), twin.sum(given, "a").view(torch.uint8)))
    assert len(wires._small_sums._calls) == 3
    return found


def test_calls_are_kept_up_to_a_number(ranks: Pools) -> None:
    assert ranks(2).run(with_few_calls) == [2, 2]


def with_few_calls() -> int:
    from narrowcast.runtime import small_sums

    transport, most = TcpTransport(), small_sums.MAX_CALLS
    small_sums.MAX_CALLS = 2
    try:
        wires = Communicator(sites("int4-feature", 2, "one_shot"), tp=transport, pp=None)
        for num_tokens in (1, 2, 3, 1, 3):
            wires.sum([values(2, num_tokens, torch.bfloat16, 0)[transport.rank]], "a")
    finally:
        small_sums.MAX_CALLS = most
    assert isinstance(wires._small_sums, SmallSums)
    return len(wires._small_sums._calls)
