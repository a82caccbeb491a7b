"""Ranks and the links between them: results, failures, order and loss, and that nothing is left behind."""

import ctypes
import hashlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError
from narrowcast.launch import Link, Ranks, emulation, is_first_rank, run
from narrowcast.transport import connect

LINK = "1Gbps,0.1ms"
PORT = 7000
CLONE_NEWUTS = 0x04000000  # linux/sched.h
PATIENCE_S = 60  # on a busy machine


def eventually(true: Callable[[], object]) -> bool:
    """True if `true()` becomes true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Links.


@given(
    st.decimals(min_value="0.001", max_value="9999", places=3),
    st.sampled_from(["", "k", "M", "G"]),
    st.decimals(min_value=0, max_value="9999", places=3),
    st.sampled_from(["ns", "us", "ms", "s"]),
)
def test_a_link_is_what_it_is_written_as(rate: object, prefix: str, delay: object, unit: str) -> None:
    link = Link.parse(f"{rate}{prefix}bps,{delay}{unit}")
    assert Link.parse(str(link)) == link
    assert link == Link.parse(f"{rate}{prefix}b/s, {delay}{unit}")
    assert link.transfer_s(0) == link.delay_s
    assert math.isclose(link.transfer_s(10**6) - link.delay_s, 8 * 10**6 / link.rate_bps, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("text", "written"),
    [("1Gbps,0.1ms", "1Gbps,100us"), ("100Mb/s,1ms", "100Mbps,1ms"), ("2.5Gbps,0s", "2.5Gbps,0ns")],
)
def test_links_are_written_in_the_largest_units(text: str, written: str) -> None:
    assert str(Link.parse(text)) == written


@pytest.mark.parametrize("text", ["", "1Gbps", "0bps,1ms", "1GB/s,1ms", "1Gbps,-1ms", "fast,soon", "1Gbps,1ms,2ms"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="expected RATE,DELAY"):
        Link.parse(text)


# Ranks.


def number_of_this_rank(offset: int) -> int:
    found = torch.tensor([dist.get_rank()])
    dist.all_reduce(found)
    return int(found) + offset + dist.get_rank()


def fail_on_rank_1(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "left":
            os._exit(3)
        raise {
            "refused": InvalidInputError("x", expected="y", found="z", remedy="No."),
            "crashed": ZeroDivisionError("oh"),
            "lost": PeerLostError([2], "adding up"),
        }[how]
    time.sleep(600)


def miss_rank_1(how: str) -> None:
    """Rank 0 is the first to speak, of rank 1, which caused it."""
    if dist.get_rank() == 1:
        time.sleep(0.3)
        fail_on_rank_1(how)
    raise PeerLostError([1], "adding up")


def add_up_in_a_group() -> int:
    """Number of threads of this process, once there is a group of its own."""
    dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1]))
    return len(list(Path("/proc/self/task").iterdir()))


def where_this_runs() -> tuple[bool, str | None, int, int]:
    """First rank or not, a variable, threads of the process that this one was forked from, threads to compute with."""
    parents = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
    return is_first_rank(), os.environ.get("NARROWCAST_TEST"), parents, torch.get_num_threads()


def test_every_rank_returns() -> None:
    assert run(number_of_this_rank, 3, 10) == [13, 14, 15]


def test_ranks_run_one_function_after_another() -> None:
    with Ranks(2) as ranks:
        assert [ranks.run(number_of_this_rank, offset) for offset in range(5)] == [[1 + i, 2 + i] for i in range(5)]
        assert ranks.alive
        with pytest.raises(InvalidInputError, match="rank 1: x: expected y"):
            ranks.run(fail_on_rank_1, "refused")
        assert not ranks.alive


def test_groups_of_one_function_are_gone_with_the_next() -> None:
    with Ranks(2) as ranks:
        first, *others = [ranks.run(add_up_in_a_group) for _ in range(4)]
        assert others == [first] * 3


def test_ranks_have_the_environment_of_now_and_no_threads_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread pool that was forked hangs when it is used: the server that ranks are forked from has one thread."""
    monkeypatch.setenv("NARROWCAST_TEST", "now")
    share = max(1, (os.cpu_count() or 1) // 2)
    assert run(where_this_runs, 2) == [(rank == 0, "now", 1, share) for rank in range(2)]


def test_under_torchrun_this_process_is_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    try:
        assert run(os.getpid, 1) == [os.getpid()]
    finally:
        torch.set_num_threads(before)
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(InvalidInputError, match="torchrun: expected 2 ranks, found 1"):
        run(os.getpid, 2)
    with pytest.raises(InvalidInputError, match="--link: expected ranks that are started for it"):
        run(os.getpid, 1, link=Link.parse(LINK))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "rank 1 was ended by SIGKILL"),
        ("left", "rank 1 ended with status 3"),
        ("refused", "rank 1: x: expected y"),
        ("crashed", "rank 1: ZeroDivisionError: oh"),
        ("lost", "lost rank 2"),
    ],
)
def test_what_a_rank_raises_ends_the_others(how: str, message: str) -> None:
    with pytest.raises(NarrowcastError, match=message) as failure:
        run(fail_on_rank_1, 2, how)
    notes = getattr(failure.value, "__notes__", [])
    assert any("in fail_on_rank_1" in note for note in notes) == (how == "crashed")


@pytest.mark.parametrize(
    ("how", "message"), [("killed", "rank 1 was ended by SIGKILL"), ("crashed", "rank 1: ZeroDivisionError: oh")]
)
def test_who_failed_comes_before_those_that_missed_it(how: str, message: str) -> None:
    with pytest.raises(NarrowcastError, match=message):
        run(miss_rank_1, 2, how)


def test_ctrl_c_ends_all_ranks() -> None:
    ranks = Ranks(2)
    processes = list(ranks.processes)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ranks.run(time.sleep, 600)
    assert not any(process.is_alive() for process in processes)


def test_links_without_root_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("multiprocessing.get_context", lambda _: pytest.fail("processes were started"))
    with pytest.raises(InvalidInputError, match=r"expected root, .* found user 1000"):
        run(number_of_this_rank, 2, 0, link=Link.parse(LINK))


# The emulator.


def stream(num_bytes: int) -> tuple[str, float, float]:
    """Rank 0 sends each other rank as many bytes at once: digest, time of start or end, a round trip's seconds."""
    rank, data = dist.get_rank(), torch.arange(num_bytes).to(torch.uint8).numpy().tobytes()
    with socket.create_server((emulation.address_of(rank), PORT)) as server:
        dist.barrier()
        peers = [socket.create_connection((emulation.address_of(0), PORT))] if rank else []
        peers += [server.accept()[0] for _ in range(dist.get_world_size() - 1)] if not rank else []
    start = time.monotonic()
    for peer in peers:
        peer.sendall(b"?") if rank == 0 else peer.recv(1)
        peer.sendall(b"!") if rank else peer.recv(1)
    trip = time.monotonic() - start
    dist.barrier()
    start, digest = time.monotonic(), hashlib.sha256()
    for peer in peers if rank == 0 else []:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
    while rank and (received := peers[0].recv(1 << 16)):
        digest.update(received)
    came = time.monotonic()
    dist.barrier()
    for peer in peers:
        peer.close()
    return (digest.hexdigest(), came, trip) if rank else (hashlib.sha256(data).hexdigest(), start, trip)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["50Mbps,2ms", "1Gbps,100us", "10Gbps,50us"])
def test_streams_arrive_whole_and_not_before_their_time(emulator: None, text: str) -> None:
    link = Link.parse(text)
    num_bytes = 1 << 20
    sent, *received = run(stream, 3, num_bytes, link=link)
    assert {digest for digest, *_ in received} == {sent[0]}
    # A sender has one link, on which both streams share the rate: the last one has arrived after both.
    assert max(came for _, came, _ in received) - sent[1] > 0.99 * 2 * num_bytes * 8 / link.rate_bps
    assert sent[2] > 2 * 2 * link.delay_s


def meet_anew(masters: list[str], interfaces: list[str]) -> tuple[int, str]:
    """Meet as torchrun's ranks do, on hosts whose names lead to loopback: sum of the ranks, interface of this one."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    assert ctypes.CDLL(None).unshare(CLONE_NEWUTS) == 0
    socket.sethostname("localhost")
    os.environ.update(MASTER_ADDR=masters[rank], MASTER_PORT=str(PORT), GLOO_SOCKET_IFNAME=interfaces[rank])
    connect(timeout_s=20)
    found = torch.tensor([rank])
    dist.all_reduce(found)
    return int(found), os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.parametrize("master", [emulation.address_of(0), "127.0.0.1"])
def test_ranks_on_two_hosts_take_the_interface_between_them(emulator: None, master: str) -> None:
    """Even where the address of the first one leads to loopback there, as its name does on many hosts."""
    masters = [master, emulation.address_of(0)]
    assert run(meet_anew, 2, masters, ["", ""], link=Link.parse(LINK)) == [(1, emulation.DEVICE)] * 2


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ("nosuch0", r"rank 1 cannot\. interface: expected a network interface of this host .* found 'nosuch0'"),
        ("lo", r"found rank 1 of the group on 127\.0\.0\.1\. Set GLOO_SOCKET_IFNAME"),
    ],
)
def test_a_wrong_interface_is_named(emulator: None, interface: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        run(meet_anew, 2, [emulation.address_of(0)] * 2, ["", interface], link=Link.parse(LINK))


def flood(num_datagrams: int, size: int) -> tuple[list[int], float]:
    """Rank 0 sends numbered datagrams as fast as it can, in so many seconds; the numbers that reach rank 1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.bind((emulation.address_of(dist.get_rank()), PORT))
        channel.settimeout(1)
        dist.barrier()
        found: list[int] = []
        start = time.perf_counter()
        if dist.get_rank() == 0:
            for index in range(num_datagrams):
                channel.sendto(index.to_bytes(4, "little") + bytes(size - 4), (emulation.address_of(1), PORT))
        else:
            try:
                while True:
                    found.append(int.from_bytes(channel.recv(size)[:4], "little"))
            except TimeoutError:
                pass
        seconds = time.perf_counter() - start
        dist.barrier()
    return found, seconds


@pytest.mark.slow
def test_a_full_queue_drops_its_tail(emulator: None) -> None:
    size, num_datagrams = 1400, 12_000  # 16.8 MB, of which 4 MB may wait
    link = Link.parse("100Mbps,1ms")
    (_, seconds), (found, _) = run(flood, 2, num_datagrams, size, link=link)
    assert found == sorted(set(found))
    whole = emulation.QUEUE_BYTES // (size + 28)
    left_meanwhile = link.rate_bps * seconds / 8 / (size + 28)
    assert found[0] == 0 and whole / 2 < len(found) < 2 * whole + left_meanwhile


def own_namespace() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def stay() -> None:
    os.write(1, f"{os.getpid()} {own_namespace()}\n".encode())  # a line at once: two ranks write here
    time.sleep(600)


def descendants(process: int) -> set[int]:
    children = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        children |= {int(each) for each in (task / "children").read_text().split()}
    return children.union(*map(descendants, children))


def runs(process: int) -> bool:
    """True if there is such a process that has not ended: whoever inherits it may be slow to take note of its end."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def namespaces() -> set[int]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(process.joinpath("ns/net").stat().st_ino)
        except OSError:
            continue
    return found


@pytest.fixture
def staying(emulator: None) -> Iterator[subprocess.Popen[str]]:
    """Two ranks on a link, started by another process, which print where they are and stay."""
    code = """
import test_launch
if __name__ == "__main__":
    test_launch.run(test_launch.stay, 2, link=test_launch.Link(1e9, 1e-4))
"""
    pipe, here = subprocess.PIPE, Path(__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, cwd=here) as process:
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_who_started_it(staying: subprocess.Popen[str], how: signal.Signals) -> None:
    """Neither ranks nor emulator, nor their namespaces, which are others than ours."""
    assert staying.stdout is not None
    ranks, inside = zip(*(map(int, staying.stdout.readline().split()) for _ in range(2)), strict=True)
    children = descendants(staying.pid)
    assert len(children) >= 4 and set(ranks) <= children and len(set(inside)) == 2
    assert not set(inside) & {own_namespace()} and set(inside) <= namespaces()
    staying.send_signal(how)
    staying.wait(PATIENCE_S)
    assert eventually(lambda: not any(map(runs, children)))
    assert not set(inside) & namespaces()
