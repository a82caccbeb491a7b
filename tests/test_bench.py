"""Benchmarks and the link emulator: rows, order and loss on links, and that nothing is left behind."""

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from commands import refused
from commands import run as run_command
from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError
from narrowcast.launch import emulation
from narrowcast.launch.link import Link
from narrowcast.launch.ranks import run
from narrowcast.perf import codec, collective, model, timing

ROWS = {
    "codec": {"codec", "op", "device", "path", "shape", "gbps", "memcpy_gbps"},
    "collective": {
        "transport", "codec", "algorithm", "world_size", "nbytes", "link", "median_us", "p99_us", "wire_bytes",
        "limit_us",
    },
    "model": {"link", "codec", "transport", "prefill_tokens", "ttft_ms", "decode_ms_per_token"},
}  # fmt: skip
LINK = "1Gbps,0.1ms"
PORT = 7000
PATIENCE_S = 60  # on a busy machine


@pytest.fixture
def emulator() -> None:
    """Skips the test where links cannot be emulated."""
    try:
        emulation.check_possible(2)
    except InvalidInputError as error:
        pytest.skip(str(error))


def eventually(true: Callable[[], object]) -> bool:
    """Whether `true()` becomes true in time."""
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
        raise {
            "refused": InvalidInputError("x", expected="y", found="z", remedy="No."),
            "lost": PeerLostError([2], ""),
        }[how]
    time.sleep(600)


def test_every_rank_returns() -> None:
    assert run(number_of_this_rank, 3, None, 10) == [13, 14, 15]


@pytest.mark.parametrize(
    ("how", "message"), [("killed", "rank 1 ended with status -9"), ("refused", "expected y"), ("lost", "lost rank 2")]
)
def test_what_a_rank_raises_ends_the_others(how: str, message: str) -> None:
    with pytest.raises(NarrowcastError, match=message):
        run(fail_on_rank_1, 2, None, how)


def test_links_without_root_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("multiprocessing.get_context", lambda _: pytest.fail("processes were started"))
    with pytest.raises(InvalidInputError, match=r"expected root, .* found user 1000"):
        run(number_of_this_rank, 2, Link.parse(LINK), 0)


# The emulator.


def stream(num_bytes: int) -> tuple[str, float, float]:
    """Rank 0 sends each other rank as many bytes at once: digest of what came, seconds it took, and of a round trip."""
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
    took = time.monotonic() - start
    dist.barrier()
    for peer in peers:
        peer.close()
    return digest.hexdigest() if rank else hashlib.sha256(data).hexdigest(), took, trip


@pytest.mark.parametrize("text", ["50Mbps,2ms", "1Gbps,100us", "10Gbps,50us"])
def test_streams_arrive_whole_and_not_before_their_time(emulator: None, text: str) -> None:
    link = Link.parse(text)
    num_bytes = 1 << 20
    sent, *received = run(stream, 3, link, num_bytes)
    assert {digest for digest, *_ in received} == {sent[0]}
    # A sender has one link, on which both streams share the rate: the last one has arrived after both.
    assert max(took for _, took, _ in received) > 0.99 * 2 * num_bytes * 8 / link.rate_bps
    assert sent[2] > 2 * 2 * link.delay_s


def flood(num_datagrams: int, size: int) -> list[int]:
    """Rank 0 sends numbered datagrams as fast as it can; the numbers that reach rank 1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.bind((emulation.address_of(dist.get_rank()), PORT))
        channel.settimeout(1)
        dist.barrier()
        found: list[int] = []
        if dist.get_rank() == 0:
            for index in range(num_datagrams):
                channel.sendto(index.to_bytes(4, "little") + bytes(size - 4), (emulation.address_of(1), PORT))
        else:
            try:
                while True:
                    found.append(int.from_bytes(channel.recv(size)[:4], "little"))
            except TimeoutError:
                pass
        dist.barrier()
    return found


def test_a_full_queue_drops_its_tail(emulator: None) -> None:
    size, num_datagrams = 1400, 12_000  # 16.8 MB, of which 4 MB may wait
    _, found = run(flood, 2, Link.parse("100Mbps,1ms"), num_datagrams, size)
    assert found == sorted(set(found))
    whole = emulation.QUEUE_BYTES // (size + 28)
    assert found[0] == 0 and whole / 2 < len(found) < 3 * whole


def own_namespace() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def stay() -> None:
    os.write(1, f"{os.getpid()} {own_namespace()}\n".encode())  # a line at once: two ranks write here
    time.sleep(600)


def of_children(process: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        found |= {int(each) for each in (task / "children").read_text().split()}
    return found


def runs(process: int) -> bool:
    """Whether there is such a process that has not ended: whoever inherits it may be slow to take note of its end."""
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
import test_bench
if __name__ == "__main__":
    test_bench.run(test_bench.stay, 2, test_bench.Link(1e9, 1e-4))
"""
    pipe, here = subprocess.PIPE, Path(__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, cwd=here) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_who_started_it(staying: subprocess.Popen[str], how: signal.Signals) -> None:
    """Neither ranks nor emulator, nor their namespaces, which are others than ours."""
    assert staying.stdout is not None
    ranks, inside = zip(*(map(int, staying.stdout.readline().split()) for _ in range(2)), strict=True)
    children = of_children(staying.pid)
    assert len(children) >= 3 and set(ranks) <= children and len(set(inside)) == 2
    assert not set(inside) & {own_namespace()} and set(inside) <= namespaces()
    staying.send_signal(how)
    staying.wait(PATIENCE_S)
    assert eventually(lambda: not any(map(runs, children)))
    assert not set(inside) & namespaces()


# Figures.


def test_a_run_lasts_from_the_last_start_to_the_last_end() -> None:
    assert timing.over_ranks([[(0, 50), (60, 80)], [(10, 30), (55, 100)]]) == [40e-9, 40e-9]


def test_cases_take_turns() -> None:
    done: list[str] = []
    cases = {name: timing.Case(lambda name=name: done.append(name), lambda: done.append("-")) for name in "ab"}
    spans = timing.interleaved(cases, 2)
    assert "".join(done) == "-a-b-a-b" and [len(each) for each in spans.values()] == [2, 2]


def test_p99_and_spread() -> None:
    assert timing.p99(range(1, 101)) == 99 and timing.p99([3, 1, 2]) == 3
    assert timing.spread([1, 2, 3]) == 0.25 and timing.spread([1]) == 0


# The commands.

OPTIONS: dict[str, list[object]] = {
    "codec": ["--codec", "int4-feature", "--codec", "bf16", "--size", "2K"],
    "collective": ["--size", "4K..16K", "--codec", "int4-feature"],
    "model": [],
}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands measure little, and a small model."""
    monkeypatch.setattr(codec, "rows", partial(codec.rows, seconds_each=0))
    monkeypatch.setattr(collective, "DEFAULT", replace(collective.DEFAULT, seconds=0))
    shape = model.Shape(hidden_size=256, num_layers=1, intermediate_size=384)
    monkeypatch.setattr(model, "DEFAULT", replace(model.DEFAULT, shape=shape, prefill=8, decode=2, rounds=1))


def report_of(command: str, folder: Path, *options: object) -> dict[str, object]:
    path = folder / "report.json"
    run_command("bench", command, *OPTIONS[command], "--json", path, *options)
    report = json.loads(path.read_text(encoding="utf8"))
    assert {"date", "command", "narrowcast", "machine", "rows"} <= report.keys()
    assert report["command"].startswith("narrowcast ") and report["machine"]["cores"] == os.cpu_count()
    assert all(row.keys() == ROWS[command] for row in report["rows"])
    return report


@pytest.mark.parametrize("command", ROWS)
def test_rows_and_picture(command: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    rows = report_of(command, tmp_path, "--plot", picture)["rows"]
    assert {row.get("link") for row in rows} == {None} and {row["codec"] for row in rows} >= {"int4-feature"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exists" in refused("bench", command, *OPTIONS[command], "--plot", picture)


def test_rows_on_a_link(emulator: None, tmp_path: Path) -> None:
    rows = report_of("collective", tmp_path, "--link", LINK)["rows"]
    assert {row["link"] for row in rows} == {"1Gbps,100us"}
    for row in rows:
        assert row["limit_us"] >= 100 and row["median_us"] > row["limit_us"] and row["wire_bytes"] > 0


def test_each_size_starts_with_the_yardsticks(tmp_path: Path) -> None:
    """Plain sockets with as many bytes as each sum sends, then the group's own sum, then ours."""
    rows = report_of("collective", tmp_path, "-tp", 3)["rows"]
    of_one = [row for row in rows if row["nbytes"] == 16384]
    kinds = [row["codec"] for row in of_one]
    assert kinds == sorted(kinds, key=["raw", "native", "int4-feature"].index)
    raw = [row["wire_bytes"] for row in of_one if row["codec"] == "raw"]
    for row in of_one:
        assert min(abs(row["wire_bytes"] - each) for each in raw) <= 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("collective", "--link", "slow"), "link: expected RATE,DELAY"),
        (("collective", "--codec", "int9"), "int9"),
        (("collective", "--transport", "pigeon"), "--transport: expected one of torch"),
        (("collective", "--size", "4M..1K"), "--size: expected SMALLEST..LARGEST"),
        (("collective", "--size", "much"), "--size: expected a number"),
        (("codec", "--link", LINK), "--link: expected none with codec"),
        (("model", "--size", "4M"), "--size: expected none with model"),
        (("model", "-tp", "1"), "-tp: expected 2 or more"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], expected: str) -> None:
    assert expected in refused("bench", *options)
