"""Rate and delay of emulated links beside what they are set to, by plain TCP sockets of two ranks (root only).

usage: python benchmarks/links.py [--json FILE] [--seconds S] [LINK...]

Prints for each link, by default 100 Mb/s to 10 Gb/s: the median round trip of one byte beside twice the delay, the
throughput of a long stream beside the most that its packets' headers leave (20 bytes IP, 32 TCP), and the share of a
core that the emulator took meanwhile.
"""

import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import reporting
import torch.distributed as dist

from narrowcast.launch import Link, emulation, run
from narrowcast.perf.machine import machine

LINKS = "100Mbps,1ms", "100Mbps,10ms", "1Gbps,100us", "1Gbps,1ms", "10Gbps,50us"
NUM_TRIPS, CHUNK, HEADERS, PORT = 500, 1 << 20, 52, 7000


def measure(num_bytes: int) -> tuple[float, float, float]:
    """On rank 0: seconds of a round trip and of the stream, seconds of CPU that the emulator took for the stream."""
    rank = dist.get_rank()
    peer = _connection(rank)
    trips = [_trip(peer, rank) for _ in range(NUM_TRIPS)]
    emulator = _emulator()
    cpu, start = _cpu_s(emulator), time.perf_counter()
    if rank == 0:
        for _ in range(num_bytes // CHUNK):
            peer.sendall(bytes(CHUNK))
        peer.recv(1)
    else:
        left, room = num_bytes, bytearray(CHUNK)
        while left:
            left -= peer.recv_into(room)
        peer.sendall(b"!")
    seconds = time.perf_counter() - start
    return statistics.median(trips), seconds, _cpu_s(emulator) - cpu


def _connection(rank: int) -> socket.socket:
    with socket.create_server((emulation.address_of(rank), PORT)) as server:
        dist.barrier()
        peer = server.accept()[0] if rank == 0 else socket.create_connection((emulation.address_of(0), PORT))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def _trip(peer: socket.socket, rank: int) -> float:
    start = time.perf_counter()
    if rank == 0:
        peer.sendall(b"?")
    peer.recv(1)
    if rank == 1:
        peer.sendall(b"!")
    return time.perf_counter() - start


def _emulator() -> Path:
    """The first child that our parent started for its ranks."""
    (task,) = Path(f"/proc/{os.getppid()}/task").glob(f"{os.getppid()}")
    children = map(int, (task / "children").read_text(encoding="ascii").split())
    policies = {child: os.sched_getscheduler(child) for child in children}
    return next(Path(f"/proc/{child}") for child, policy in policies.items() if policy == os.SCHED_FIFO)


def _cpu_s(process: Path) -> float:
    fields = (process / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def row(link: Link, seconds: float) -> dict[str, Any]:
    num_bytes = max(int(link.rate_bps / 8 * seconds) // CHUNK, 1) * CHUNK
    trip, took, cpu = run(measure, 2, num_bytes, link=link)[0]
    mtu = emulation.mtu_of(link)
    return {
        "link": str(link),
        "mtu": mtu,
        "round_trip_us": trip * 1e6,
        "round_trip_limit_us": 2e6 * link.delay_s,
        "mbps": num_bytes * 8 / took / 1e6,
        "mbps_limit": link.rate_bps / 1e6 * (mtu - HEADERS) / mtu,
        "emulator_cpu": cpu / took,
    }


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("links", nargs="*", metavar="LINK", default=LINKS)
    parser.add_argument("--seconds", type=float, default=3)
    arguments = parser.parse_args()
    rows = []
    for link in map(Link.parse, arguments.links):
        rows.append(row(link, arguments.seconds))
        print(
            "{link:12} MTU {mtu:5}  round trip {round_trip_us:7.0f} of {round_trip_limit_us:7.0f} us  "
            "{mbps:7.1f} of {mbps_limit:7.1f} Mb/s  CPU {emulator_cpu:.0%}".format(**rows[-1]),
            flush=True,
        )
    reporting.write(arguments.json, machine=machine(), rows=rows)


if __name__ == "__main__":
    main()
