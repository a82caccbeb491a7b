"""`narrowcast doctor` on several ranks: what it finds out, and that it names what is in the way instead of hanging."""

import ctypes
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from commands import refused, save_plan, typed
from conftest import MODEL
from models import save_random
from narrowcast.launch import Link, emulation, run
from narrowcast.preflight import ways
from narrowcast.transport.tcp import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="needs the compiled module")

CLONE_NEWUTS = 0x04000000  # linux/sched.h
LINK = "1Gbps,1ms"
ELSEWHERE = [emulation.address_of(rank) for rank in range(3)]

needs_ip = pytest.mark.skipif(not shutil.which("ip") or not shutil.which("tc"), reason="needs ip and tc (iproute2)")


@dataclass(frozen=True)
class Doctor:
    """A rank's: its own arguments, and what makes its process (Python), host (shell) and environment differ."""

    arguments: Sequence[object] = ()
    python: str = ""
    shell: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    comes: bool = True


@dataclass(frozen=True)
class Said:
    """What a doctor ends with."""

    status: int
    out: str
    errors: str
    report: dict[str, Any]

    @property
    def problems(self) -> list[str]:
        """The lines of problems, each as one."""
        return [" ".join(each.split()) for each in re.split(r"^- ", self.out, flags=re.MULTILINE)[1:]]


def said(*doctors: Doctor, link: str | None = None, hosts: Sequence[str] = ELSEWHERE, timeout_s: float = 60) -> Any:
    """What the doctors that come say: processes on this host, or each on a host of its own, joined by `link`."""
    names = hosts[: len(doctors)] if link else ["127.0.0.1"] * len(doctors)
    asked = "--hosts", ",".join(names), "--timeout", timeout_s
    found = run(of_this_rank, len(doctors), doctors, asked, link=Link.parse(link) if link else None)
    return [each for each in found if each is not None]


def of_this_rank(doctors: Sequence[Doctor], asked: Sequence[object]) -> Said | None:
    rank, ports = dist.get_rank(), [free_port()]
    doctor = doctors[rank]
    dist.broadcast_object_list(ports)
    if not doctor.comes:
        return None
    if os.environ.pop("GLOO_SOCKET_IFNAME") == emulation.DEVICE:
        assert ctypes.CDLL(None).unshare(CLONE_NEWUTS) == 0
        socket.sethostname(doctor.environment.get("HOST", f"node-{rank}"))
    os.environ.update({"MASTER_PORT": f"{ports[0]}", **doctor.environment})
    subprocess.run(["sh", "-ec", doctor.shell], check=True)
    exec(doctor.python, {})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = typed("doctor", *asked, "--node-rank", rank, "--json", report, *doctor.arguments)
        told = json.loads(report.read_text(encoding="utf8")) if report.exists() else {}
    return Said(done.returncode, done.stdout, done.stderr, told)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_where_all_is_well_it_says_so_in_80_columns(world_size: int) -> None:
    first, *others = said(*[Doctor()] * world_size)
    assert first.status == 0 and "no problem found" in first.out, first
    assert max(map(len, first.out.splitlines())) <= 80
    assert all((each.status, each.out) == (0, first.out) for each in others), "all show what was found"
    ranks, pairs = first.report["ranks"], first.report["pairs"]
    assert [each["rank"] for each in ranks] == list(range(world_size)) and first.report["problems"] == []
    assert {each["interface"] for each in ranks} == {"lo"}
    assert all(abs(each["clock_s"]) < 0.1 for each in ranks)
    assert [(pair["low"], pair["high"]) for pair in pairs] == list(itertools.combinations(range(world_size), 2))
    assert all(pair["there_bps"] > 1e8 and pair["back_bps"] > 1e8 for pair in pairs)


@pytest.mark.parametrize("text", ["100Mbps,5ms", "1Gbps,1ms"])
def test_latency_and_rate_of_a_link_are_found_out(emulator: None, text: str) -> None:
    link = Link.parse(text)
    for each in said(Doctor(), Doctor(), link=text):
        assert each.status == 0, each
        (pair,), ranks = each.report["pairs"], each.report["ranks"]
        assert link.delay_s <= pair["latency_s"] < 2 * link.delay_s
        assert link.rate_bps / 2 < pair["there_bps"] < 2 * link.rate_bps
        assert link.rate_bps / 2 < pair["back_bps"] < 2 * link.rate_bps
        assert [rank["address"] for rank in ranks] == ELSEWHERE[:2]
        assert {rank["mtu"] for rank in ranks} == {emulation.mtu_of(link)}


@needs_ip
def test_who_does_not_reach_whom_is_named_and_the_others_are_measured(emulator: None) -> None:
    """As a firewall does it that drops what goes from rank 2 to rank 1."""
    blocked = Doctor(shell=f"ip route add blackhole {ELSEWHERE[1]}/32")
    for each in said(Doctor(), Doctor(), blocked, link=LINK):
        assert each.status == 1
        there, back = each.problems
        assert there.startswith(
            "Rank 1 (10.78.0.2) does not reach rank 2 (10.78.0.3) on 10.78.0.3: no answer. Let no f"
        )
        assert back.startswith("Rank 2 (10.78.0.3) does not reach rank 1 (10.78.0.2) on 10.78.0.2: ")
        assert [(pair["low"], pair["high"]) for pair in each.report["pairs"]] == [(0, 1), (0, 2)]
        assert all(pair["there_bps"] > 1e8 for pair in each.report["pairs"])


@needs_ip
def test_large_packets_that_get_lost_are_told_from_a_dead_link(emulator: None) -> None:
    """A hop on the way drops what is larger than 3000 bytes, without a word."""
    narrow = Doctor(shell=f"tc qdisc add dev {emulation.DEVICE} root tbf rate 10gbit burst 3000 latency 50ms")
    for each in said(narrow, Doctor(), link=LINK):
        assert each.status == 1 and each.report["pairs"][0]["latency_s"] < 0.05
        (found,) = each.problems
        assert found.startswith("Large messages from rank 0 to rank 1 do not arrive, small ones do.")
        assert found.endswith("ip link set dev NAME mtu 9000.")


@needs_ip
def test_mtus_that_differ_are_told(emulator: None) -> None:
    for each in said(Doctor(), Doctor(shell=f"ip link set dev {emulation.DEVICE} mtu 1500"), link=LINK):
        assert each.status == 1
        assert each.problems[0].startswith("MTUs differ: 9000 on rank 0; 1500 on rank 1. Set one MTU")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HOST": "localhost"}, "Rank 1 (10.78.0.2): localhost leads to 127.0.0.1 there, which gloo"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, "Rank 1 (10.78.0.2) binds 127.0.0.1, which other hosts do not reach. Set GLOO"),
        ({"GLOO_SOCKET_IFNAME": "no0"}, "Rank 1 (10.78.0.2) takes no interface. interface: expected a network inter"),
    ],
)
def test_a_name_or_an_interface_that_leads_nowhere_is_named(
    emulator: None, environment: dict[str, str], message: str
) -> None:
    for each in said(Doctor(), Doctor(environment=environment), link=LINK):
        assert each.status == 1 and "".join(each.problems[:1]).startswith(message), each


def test_a_name_of_rank_0_that_leads_to_loopback_elsewhere_is_named(emulator: None) -> None:
    """Then they do not even meet."""
    first, second = said(Doctor(), Doctor(), link=LINK, hosts=["localhost", ELSEWHERE[1]], timeout_s=2)
    assert first.status == second.status == 1
    assert first.problems[0].startswith("Rank 1 (10.78.0.2) did not come within 2 s.")
    assert "found connection refused, as localhost leads to 127.0.0.1 here. In /etc/hosts" in second.errors


def test_a_rank_whose_own_name_leads_to_loopback_listens_where_the_others_are(emulator: None) -> None:
    """As ranks at work do."""
    for each in said(Doctor(["--hosts", f"localhost,{ELSEWHERE[1]}"]), Doctor(), link=LINK):
        assert [rank["address"] for rank in each.report["ranks"]] == ELSEWHERE[:2]
        (found,) = each.problems
        assert "localhost leads to 127.0.0.1 there" in found and each.report["pairs"][0]["there_bps"] > 1e8


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The problems of three ranks: of the second, all is different, and the third lacks its files."""
    folder = tmp_path_factory.mktemp("files")
    plans = [save_plan(folder / codec, codec) for codec in ("int4-group128", "int8-group128")]
    late = "import time; now = time.time; time.time = lambda: now() + 100"
    ours = "from narrowcast.preflight import card"
    old = f"{ours}; found = card.versions; card.versions = lambda: found() | {{'torch': '2.0'}}"
    bare = f"{ours}; card.COMPILED = False"
    first, *others = said(
        Doctor(["--plan", plans[0], "--model", MODEL]),
        Doctor(["--plan", plans[1], "--model", save_random("llama", folder / "model")], f"{late}\n{old}"),
        Doctor(["--plan", folder / "none", "--model", folder / "no"], bare),
    )
    assert [each.status for each in (first, *others)] == [1] * 3
    assert max(map(len, first.out.splitlines())) <= 80
    return [f"{each['found']}. {each['remedy']}" for each in first.report["problems"]]


@pytest.mark.parametrize(
    "message",
    [
        r"the clock of rank 1 \(127\.0\.0\.1\) is (99\.9|100\.\d) s ahead of rank 0's\. Let the hosts set their clocks",
        r"versions of torch differ: 2\.\d+\.\S+ on ranks 0 and 2; 2\.0 on rank 1\. Install the same",
        r"rank 2 without the compiled module: .*\. Install a C\+\+ compiler",
        r"plans differ: [0-9a-f]{12} on rank 0; [0-9a-f]{12} on rank 1\. Copy one to all",
        r"models differ, as in hidden_size: 256 on rank 0; \d+ on rank 1\. Give all ranks",
        r"rank 2 \(127\.0\.0\.1\) cannot use what it is given\. plan \S+none: expected a plan file, found no such file",
        r"rank 2 \(127\.0\.0\.1\) cannot use what it is given\. model \S+no: expected .* found no such folder",
    ],
)
def test_what_differs_between_ranks_is_told(differing: list[str], message: str) -> None:
    assert any(re.match(message, each) for each in differing), "\n".join(differing)


def test_a_rank_that_never_comes_is_named() -> None:
    for each in said(Doctor(), Doctor(), Doctor(comes=False), timeout_s=2):
        assert each.status == 1
        (found,) = each.problems
        assert found.startswith("Rank 2 (127.0.0.1) did not come within 2 s. Start the same command with --node-rank 2")


def test_where_rank_0_never_comes_its_address_is_named() -> None:
    (done,) = said(Doctor(comes=False), Doctor(), timeout_s=1)
    assert done.status == 1
    assert re.search(
        r"error: rank 0: expected its store at 127\.0\.0\.1:\d+, found connection refused\. St", done.errors
    )


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (
            "import sys; from narrowcast.preflight import ways; ways.unreached = lambda *_: sys.exit(3)",
            "Rank 1 (127.0.0.1) was lost while reaching each other.",
        ),
        (
            "from narrowcast.transport.handshake import Meeting; Meeting.meet = lambda *_: {}",
            "Rank 0 (127.0.0.1) accepted the connection of rank 1 (127.0.0.1), and is silent.",
        ),
    ],
)
def test_who_leaves_or_falls_silent_is_named(python: str, message: str) -> None:
    first, _ = said(Doctor(), Doctor(python=python), timeout_s=2)
    assert first.status == 1
    assert first.problems[0].startswith(message)


@pytest.mark.slow
def test_as_typed_on_two_machines() -> None:
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", "MASTER_PORT": f"{free_port()}"}
    command = [sys.executable, "-m", "narrowcast", "doctor", "--hosts", "127.0.0.1,localhost", "--node-rank"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    doctors = [subprocess.Popen([*command, rank], text=True, env=environment, **pipes) for rank in "01"]
    found = [each.communicate(timeout=100) for each in doctors]
    assert [each.returncode for each in doctors] == [0, 0], found
    assert all("no problem found" in out for out, _ in found)


@pytest.mark.slow
def test_under_torchrun_the_first_rank_shows_it_once() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "narrowcast", "doctor"]
    settings = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no problem found") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "a"], "--hosts: expected two or more, with commas, found 'a'"),
        (["--hosts", "a,,b", "--node-rank", 0], "--hosts: expected two or more, with commas, found 'a,,b'"),
        (["--hosts", "a,b"], "--node-rank: expected the place of this host among --hosts, 0 to 1, found none"),
        (["--hosts", "a,b", "--node-rank", 2], "--node-rank: .* 0 to 1, found 2"),
        (["--node-rank", 0], "--node-rank: expected several ranks, found this process alone"),
        (["--plan", "x"], "--plan: expected several ranks, found this process alone. Pass --hosts"),
    ],
)
def test_wrong_flags_are_one_sentence(arguments: list[object], message: str) -> None:
    assert re.match(message, refused("doctor", *arguments))


def test_hosts_are_not_for_torchruns_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "--hosts: expected a doctor alone" in refused("doctor", "--hosts", "a,b", "--node-rank", 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
def test_rounds_have_every_pair_once_and_a_rank_at_most_once(num_ranks: int) -> None:
    found = ways.rounds(range(10, 10 + num_ranks))
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(10, 10 + num_ranks), 2))
    assert all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in found)
