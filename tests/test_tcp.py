"""The TCP mesh: bytes arrive in whatever order, sizes are checked, losses are named."""

import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import narrowcast
from narrowcast.codecs import CastCodec
from narrowcast.errors import InvalidInputError, PeerLostError
from narrowcast.transport import TcpTransport, Transport, choice, connect_group, tcp
from narrowcast.transport.handshake import Meeting
from ranks import Ranks

_native = pytest.importorskip("narrowcast._native")

Pools = Callable[[int], Ranks]
FP32 = CastCodec(dtype=torch.float32)
CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> Iterator[Callable[[int], Ranks]]:
    """Ranks of one test alone, which it may kill."""
    pools: list[Ranks] = []

    def of(world_size: int) -> Ranks:
        pools.append(Ranks(world_size))
        return pools[-1]

    yield of
    for pool in pools:
        pool.close()


def pattern(src: int, dst: int, tag: int, nbytes: int) -> Tensor:
    """Bytes that `src` sends to `dst` under a tag."""
    generator = torch.Generator().manual_seed(1_000_003 * src + 1009 * dst + tag)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)


class Traffic:
    """One exchange of `sizes[src][dst]` bytes, started on construction; `check` waits, and compares what came."""

    def __init__(self, transport: Transport, sizes: list[list[int]], tag: int) -> None:
        rank, peers = transport.rank, range(transport.world_size)
        self.expected = [None if peer == rank else pattern(peer, rank, tag, sizes[peer][rank]) for peer in peers]
        self.recvs = [None if each is None else torch.zeros_like(each) for each in self.expected]
        sends = [None if peer == rank else pattern(rank, peer, tag, sizes[rank][peer]) for peer in peers]
        self.work = transport.exchange(sends, self.recvs, tag=tag)

    def check(self) -> None:
        self.work.wait()
        for found, expected in zip(self.recvs, self.expected, strict=True):
            assert found is None or (expected is not None and torch.equal(found, expected))


def ragged(world_size: int, seed: int, largest: int) -> list[list[int]]:
    chance = random.Random(seed)
    sizes = [0, 1, 15, 16, 17, 4096, 16383, 16384, 16385, 70000, largest]
    return [[chance.choice(sizes) for _ in range(world_size)] for _ in range(world_size)]


def evenly(world_size: int, nbytes: int) -> list[list[int]]:
    return [[nbytes] * world_size] * world_size


def check_ragged() -> None:
    transport = TcpTransport()
    for tag in range(40):
        Traffic(transport, ragged(transport.world_size, tag, 400_000), tag).check()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ragged_sizes_arrive(ranks: Pools, world_size: int) -> None:
    ranks(world_size).run(check_ragged)


def check_out_of_order(others_first: bool) -> None:
    """Each rank starts 30 exchanges in an order of its own and waits in another one."""
    transport = TcpTransport()
    chance = random.Random(transport.rank)
    tags = [100 + index for index in range(30)]
    order = chance.sample(tags, len(tags))
    under_way = {tag: Traffic(transport, ragged(transport.world_size, tag, 100_000), tag) for tag in order}
    if others_first:
        time.sleep(0.02 * transport.rank)
    for tag in chance.sample(tags, len(tags)):
        under_way[tag].check()


@pytest.mark.parametrize("others_first", [False, True])
def test_exchanges_in_any_order(ranks: Pools, others_first: bool) -> None:
    ranks(3).run(check_out_of_order, others_first)


def check_early_frames() -> None:
    """Rank 0 is 20 exchanges ahead: what it sent waits at rank 1, small and large, two under one tag."""
    transport = TcpTransport()
    if transport.rank == 0:
        for index in range(20):
            nbytes = 300_000 if index % 2 else 50
            transport.exchange([None, pattern(0, 1, index, nbytes)], [None, None], tag=1000 + index // 2).wait()
        dist.barrier()
        return
    dist.barrier()
    for index in [18, 19, *range(18)]:
        found = torch.empty(300_000 if index % 2 else 50, dtype=torch.uint8)
        transport.exchange([None, None], [found, None], tag=1000 + index // 2).wait()
        assert torch.equal(found, pattern(0, 1, index, len(found)))


def test_frames_that_nobody_waits_for_yet_are_kept(ranks: Pools) -> None:
    ranks(2).run(check_early_frames)


def check_small_in_a_row() -> float:
    """Seconds of 30 rounds of three small messages and an answer."""
    transport = TcpTransport()
    started = time.monotonic()
    for tag in range(1500, 1800, 10):
        one_way = [Traffic(transport, [[0, 9], [0, 0]], tag + index) for index in range(3)]
        for each in one_way:
            each.check()
        Traffic(transport, evenly(2, 20), tag + 3).check()
    return time.monotonic() - started


def test_no_message_waits_for_an_acknowledgement(ranks: Pools) -> None:
    """Without TCP_NODELAY each round takes 40 ms."""
    assert max(ranks(2).run(check_small_in_a_row)) < 0.6


def check_large_both_ways() -> None:
    transport = TcpTransport(timeout_s=30)
    Traffic(transport, evenly(2, 64 << 20), 2000).check()


def test_large_messages_both_ways_at_once(ranks: Pools) -> None:
    ranks(2).run(check_large_both_ways)


def check_two_meshes(first: list[int]) -> None:
    """Both ranks send 16 MB in each of two groups; they wait for them in opposite order."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    transports = [TcpTransport(group, timeout_s=30) for group in groups]
    traffic = [Traffic(transport, evenly(2, 16 << 20), 3000) for transport in transports]
    for index in (first[dist.get_rank()], 1 - first[dist.get_rank()]):
        traffic[index].check()


def test_a_wait_in_one_mesh_moves_the_bytes_of_another(ranks: Pools) -> None:
    ranks(2).run(check_two_meshes, [0, 1])


def check_progress_without_waiting() -> float:
    """Seconds that rank 1 waits for 32 MB from rank 0, which does something else for two seconds meanwhile."""
    transport = TcpTransport(timeout_s=30)
    payload, room = torch.ones(32 << 20, dtype=torch.uint8), torch.empty(32 << 20, dtype=torch.uint8)
    if transport.rank == 0:
        work = transport.exchange([None, payload], [None, None], tag=4000)
        time.sleep(2)
        work.wait()
        return 0.0
    started = time.monotonic()
    transport.exchange([None, None], [room, None], tag=4000).wait()
    assert torch.equal(room, payload)
    return time.monotonic() - started


def test_bytes_move_while_nobody_waits(ranks: Pools) -> None:
    assert ranks(2).run(check_progress_without_waiting)[1] < 1.0


def check_threads() -> None:
    """Four threads of each rank exchange at once."""
    transport = TcpTransport(timeout_s=30)
    failures: list[BaseException] = []

    def exchange(first: int) -> None:
        try:
            for tag in range(first, first + 40):
                Traffic(transport, ragged(2, tag, 1 << 20), tag).check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=exchange, args=(5000 + 100 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_several_threads_at_once(ranks: Pools) -> None:
    ranks(2).run(check_threads)


def check_let_go() -> None:
    """Exchanges that nobody keeps: their buffers must outlive the bytes."""
    transport = TcpTransport(timeout_s=30)
    for tag in range(6000, 6050):
        Traffic(transport, evenly(2, 300_000), tag)
    Traffic(transport, evenly(2, 10), 6050).check()
    dist.barrier()


def test_buffers_outlive_an_exchange_that_was_let_go(ranks: Pools) -> None:
    ranks(2).run(check_let_go)


def check_contradiction(sent: int, expected: int, early: bool) -> str:
    transport = TcpTransport()
    message = "agreed"
    if transport.rank == 0:
        transport.exchange([None, pattern(0, 1, 0, sent)], [None, None], tag=7000).wait()
        dist.barrier()
    else:
        room = torch.zeros(expected, dtype=torch.uint8)
        if early:
            dist.barrier()
        work = transport.exchange([None, None], [room, None], tag=7000)
        with pytest.raises(InvalidInputError) as error:
            work.wait()
        message = str(error.value)
        if not early:
            dist.barrier()
    Traffic(transport, evenly(2, 5000), 7001).check()  # the connection is still in step
    return message


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("sent", "expected"), [(128, 256), (256, 128), (500_000, 16), (16, 500_000)])
def test_contradicting_sizes_are_told(ranks: Pools, sent: int, expected: int, early: bool) -> None:
    message = ranks(2).run(check_contradiction, sent, expected, early)[1]
    assert message.startswith(
        f"payload of rank 0: expected {expected} bytes, as this rank receives, found {sent} bytes"
    )


def check_idle() -> float:
    """Seconds of this process's CPU while it waits for a rank that sleeps."""
    transport = TcpTransport()
    room = torch.zeros(10, dtype=torch.uint8)
    dist.barrier()
    if transport.rank == 0:
        time.sleep(1.5)
        transport.exchange([None, pattern(0, 1, 0, 10)], [None, None], tag=8000).wait()
        return 0.0
    before = time.process_time()
    transport.exchange([None, None], [room, None], tag=8000).wait()
    return time.process_time() - before


def test_who_waits_burns_no_core(ranks: Pools) -> None:
    """1.5 seconds of waiting: a loop that never slept would take them all."""
    assert ranks(2).run(check_idle)[1] < 0.75


def connections_are_kept() -> tuple[int, int]:
    """Sockets of this process after the first and after the tenth transport of a group."""
    transports = [TcpTransport()]
    before = num_sockets()
    transports += [TcpTransport() for _ in range(9)]
    return before, num_sockets()


def num_sockets() -> int:
    return sum(path.is_socket() for path in Path("/proc/self/fd").iterdir())


def test_a_groups_connections_are_made_once(ranks: Pools) -> None:
    for before, after in ranks(3).run(connections_are_kept):
        assert before == after


def close_with_the_group() -> tuple[int, int]:
    before = num_sockets()
    group = dist.new_group([0, 1])
    transport = TcpTransport(group)
    Traffic(transport, evenly(2, 10), 0).check()
    dist.barrier()
    dist.destroy_process_group(group)
    del group, transport
    return before, num_sockets()


def test_connections_go_with_their_group(ranks: Pools) -> None:
    for before, after in ranks(2).run(close_with_the_group):
        assert after <= before


def leave_early(marks: Path) -> float | tuple[int, ...]:
    """Rank 2 exits when it has done its part; the others go on, and only then need it once more."""
    transport = TcpTransport(timeout_s=20)
    Traffic(transport, evenly(3, 1 << 20), 0).check()
    if transport.rank == 2:
        os._exit(0)
    while not (marks / "gone").exists():
        time.sleep(0.01)
    without = [[0, 5000, 0], [5000, 0, 0], [0, 0, 0]]
    for tag in range(1, 50):
        Traffic(transport, without, tag).check()
    try:
        Traffic(transport, evenly(3, 5000), 50).check()
    except PeerLostError as error:
        return error.ranks
    return ()


def test_a_rank_may_leave_that_nobody_needs(fresh: Pools, tmp_path: Path) -> None:
    pool = fresh(3)
    pool.run(int)
    pool.start(leave_early, tmp_path)
    pool.processes[2].join(60)
    (tmp_path / "gone").touch()
    assert [pool.result(rank) for rank in (0, 1)] == [(2,), (2,)]


def leave_its_last_bytes() -> None:
    """Rank 1 sends and exits; rank 0 asks for it only later."""
    transport = TcpTransport(timeout_s=20)
    dist.barrier()
    if transport.rank == 1:
        transport.exchange([pattern(1, 0, 0, 100_000), None], [None, None], tag=0).wait()
        os._exit(0)
    time.sleep(0.5)
    found = torch.empty(100_000, dtype=torch.uint8)
    transport.exchange([None, None], [None, found], tag=0).wait()
    assert torch.equal(found, pattern(1, 0, 0, 100_000))


def test_what_a_rank_sent_before_it_left_arrives(fresh: Pools) -> None:
    pool = fresh(2)
    pool.start(leave_its_last_bytes)
    pool.result(0)


def sum_until_lost(marks: Path, seed: int) -> tuple[int, ...]:
    transport = TcpTransport(timeout_s=60)
    sizes, tag = ragged(3, seed, 3 << 20), 0
    try:
        while True:
            Traffic(transport, sizes, tag).check()
            narrowcast.all_reduce(torch.ones(40, 64), codec=FP32, group=transport, algorithm="two_shot")
            (marks / f"{transport.rank}").touch()
            tag += 1
    except PeerLostError as error:
        return error.ranks


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_rank_killed_at_a_random_moment_is_named(fresh: Pools, tmp_path: Path, lost: int) -> None:
    chance = random.Random(lost)
    pool = fresh(3)
    pool.start(sum_until_lost, tmp_path, lost)
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.01)
    time.sleep(chance.random() / 10)
    os.kill(pool.processes[lost].pid, signal.SIGKILL)
    assert [pool.result(rank) for rank in range(3) if rank != lost] == [(lost,)] * 2


def stop_and_be_missed() -> tuple[tuple[int, ...], float]:
    transport = TcpTransport(timeout_s=2.0)
    Traffic(transport, evenly(3, 10), 0).check()
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    try:
        Traffic(transport, evenly(3, 10), 1).check()
    except PeerLostError as error:
        return error.ranks, time.monotonic() - started
    return (), 0.0


def test_a_rank_that_hangs_is_named_after_the_deadline(fresh: Pools) -> None:
    pool = fresh(3)
    pool.start(stop_and_be_missed)
    try:
        for survivor in (0, 2):
            missed, seconds = pool.result(survivor)
            assert missed == (1,)
            assert 1.9 < seconds < 20
    finally:
        os.kill(pool.processes[1].pid, signal.SIGCONT)


def never_come() -> tuple[int, ...]:
    if dist.get_rank() == 2:
        return ()
    try:
        TcpTransport(timeout_s=1.0)
    except PeerLostError as error:
        return error.ranks
    return ()


def test_a_rank_that_never_comes_is_named(fresh: Pools) -> None:
    assert fresh(3).run(never_come) == [(2,), (2,), ()]


def die_on_the_way(how: str) -> tuple[int, ...]:
    """Rank 1 leaves its address, and then meets nobody."""
    if dist.get_rank() == 1:
        Meeting.meet = lambda self, timeout_s: os._exit(0) if how == "dies" else time.sleep(60)  # type: ignore
    try:
        TcpTransport(timeout_s=1.0)
    except PeerLostError as error:
        return error.ranks
    return ()


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_lost_while_connecting_is_named(fresh: Pools, how: str) -> None:
    pool = fresh(3)
    pool.start(die_on_the_way, how)
    assert [pool.result(rank) for rank in (0, 2)] == [(1,), (1,)]


def be_interrupted() -> str:
    """Ctrl-C reaches a rank that waits, and does not leave it to whoever started it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    transport = TcpTransport(timeout_s=60)
    dist.barrier()
    if transport.rank == 1:
        dist.barrier()
        return ""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        transport.exchange([None, None], [None, torch.empty(5, dtype=torch.uint8)], tag=0).wait()
    except KeyboardInterrupt:
        dist.barrier()
        return f"after {time.monotonic() - started:.0f} s"
    return "nothing"


def test_a_wait_can_be_interrupted(fresh: Pools) -> None:
    assert fresh(2).run(be_interrupted)[0] == "after 0 s"


def fork_and_die(marks: Path) -> tuple[int, ...]:
    """Rank 1 is killed; a child that it forked lives on, and must not keep its connections open."""
    transport = TcpTransport(timeout_s=60)
    Traffic(transport, evenly(2, 10), 0).check()
    if transport.rank == 1:
        if os.fork() == 0:
            time.sleep(8)
            os._exit(0)
        os._exit(1)
    started = time.monotonic()
    try:
        Traffic(transport, evenly(2, 10), 1).check()
    except PeerLostError as error:
        assert time.monotonic() - started < 6
        return error.ranks
    return ()


def test_a_forked_child_keeps_no_connection(fresh: Pools, tmp_path: Path) -> None:
    pool = fresh(2)
    pool.start(fork_and_die, tmp_path)
    assert pool.result(0) == (1,)


# The frame parser, alone: a mesh of one connection, whose other end is ours.


def broken_peer(sent: bytes, *, close: bool) -> tuple[Any, bytes]:
    """Outcome of waiting for 64 bytes under tag 5 from a peer that sends something else; and the room for them."""
    ours, theirs = socket.socketpair()
    mesh = _native.Mesh([-1, theirs.detach()], spin=False)
    room = bytearray(64)
    address = torch.frombuffer(room, dtype=torch.uint8).data_ptr()
    exchange = mesh.exchange([], [(1, address, 64)], 5, room)
    ours.setblocking(False)
    sent = sent[: 1 << 16]
    ours.send(sent)
    if close:
        ours.close()
    outcome = exchange.wait(0.01)
    ours.close()
    del exchange, mesh
    return outcome, bytes(room)


def test_garbage_after_the_handshake_is_a_loss() -> None:
    chance = random.Random(0)
    for length in [1, 15, 16, 17, 100, 5000, 60_000] * 20:
        outcome, _ = broken_peer(chance.randbytes(length), close=True)
        assert outcome is not None and outcome[:2] == ("lost", 1)


def test_the_parser_survives_any_header() -> None:
    """Frames cut anywhere, sizes at every limit, tags that nobody waits for: a right payload or a clear outcome."""
    chance = random.Random(1)
    limits = [0, 1, 63, 64, 65, 16384, 1 << 30, (1 << 30) + 1, 1 << 40, (1 << 40) + 1, (1 << 63) - 1, (1 << 64) - 1]
    kinds = set()
    for _ in range(400):
        frames = b""
        for _ in range(chance.randrange(4)):
            tag, nbytes = chance.choice([5, 5, 6, 0, (1 << 64) - 1]), chance.choice(limits)
            frames += struct.pack("<QQ", tag, nbytes) + bytes([tag & 255]) * chance.choice([0, 1, min(nbytes, 20_000)])
        outcome, room = broken_peer(frames[: chance.randrange(len(frames) + 1)], close=chance.random() < 0.5)
        kinds.add(None if outcome is None else outcome[0])
        assert outcome is not None or len(room) == 64
    assert kinds == {None, "lost", "timeout", "mismatch"}


# Choosing it.


def disagree(what: str) -> str:
    """Rank 1 of two has no compiled module, is on another host, lacks an interface, or asks for another transport."""
    odd = dist.get_rank() == 1
    if odd and what == "module":
        tcp.COMPILED = choice.COMPILED = False
    if odd and what == "network":
        tcp.Host.this = classmethod(lambda cls: cls(machine="", network="another"))  # type: ignore[method-assign]
    chosen = "" if what == "options" else connect_group(None, device=CPU).name
    try:
        if what == "interface":
            TcpTransport(dist.new_group([0, 1]), interface="nosuch0" if odd else None)
        connect_group(None, transport="torch" if odd and what == "options" else "tcp", device=CPU)
    except InvalidInputError as error:
        return f"{chosen}: {error}"
    return chosen


@pytest.mark.parametrize(
    ("what", "chosen", "message"),
    [
        ("module", "torch.distributed", "rank 1 lacks the compiled module"),
        ("network", "torch.distributed", "Set GLOO_SOCKET_IFNAME"),
        ("interface", "tcp", "found that rank 1 cannot. interface: expected a network interface of this host"),
        ("options", "", "transport of rank 1: expected that of rank 0, 'tcp', found 'torch'"),
    ],
)
def test_ranks_that_cannot_agree_are_told_alike(fresh: Pools, what: str, chosen: str, message: str) -> None:
    for told in fresh(2).run(disagree, what):
        assert told.startswith(f"{chosen}: ") and message in told


def choose() -> list[str]:
    chosen = [connect_group(None, transport=name, device=CPU) for name in ("auto", "tcp", "torch")]
    return [type(transport).__name__ for transport in chosen]


def test_auto_takes_the_mesh_where_all_have_it(ranks: Pools) -> None:
    assert ranks(2).run(choose) == [["TcpTransport", "TcpTransport", "TorchDistributedTransport"]] * 2
    with pytest.raises(InvalidInputError, match="one of auto, tcp, torch, found 'rdma'"):
        connect_group(None, transport="rdma", device=CPU)
