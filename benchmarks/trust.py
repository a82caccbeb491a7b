"""The promises of the TCP mesh put to the test: ranks killed at random moments, and strangers at the door.

usage: python benchmarks/trust.py [--kills N] [--strangers N] [--seed N] [--json FILE]

Kills: three ranks exchange and sum without pause, or still connect, when SIGKILL takes one of them; each survivor must
name it. Strangers: while rank 0 waits for the others, strangers come to its port: silent, with garbage, with a
handshake recorded from rank 1, half-open or reset, and with the right protocol but not the secret. None may get in,
and the ranks must end with the right sum. Exits with 1 if anything of this fails.
"""

import contextlib
import os
import random
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import narrowcast
from narrowcast.codecs import CastCodec
from narrowcast.collectives import simulate
from narrowcast.errors import PeerLostError
from narrowcast.transport import TcpTransport
from narrowcast.transport.handshake import MAX_UNPROVEN, Credentials, Meeting, Steps
from ranks import Ranks

WORLD_SIZE = 3
FP32 = CastCodec(dtype=torch.float32)
CONNECTING_S = 2.0  # deadline of the kills that hit ranks which still connect
GREETING_NBYTES = 40


def until_lost(marks: Path, seed: int, timeout_s: float) -> tuple[tuple[int, ...], float]:
    """Whom this rank misses, and when it knew."""
    try:
        transport = TcpTransport(timeout_s=timeout_s)
        (marks / f"{transport.rank}").touch()
        sizes = random.Random(seed).choices([100, 9000, 300_000, 3_000_000], k=5)
        for tag in range(10**9):
            payload = torch.empty(sizes[tag % len(sizes)], dtype=torch.uint8)
            sends = [None if peer == transport.rank else payload for peer in range(WORLD_SIZE)]
            recvs = [None if peer == transport.rank else torch.empty_like(payload) for peer in range(WORLD_SIZE)]
            transport.exchange(sends, recvs, tag=10**9 + tag).wait()
            narrowcast.all_reduce(torch.ones(40, 64), codec=FP32, group=transport, algorithm="two_shot")
    except PeerLostError as error:
        return error.ranks, time.time()
    raise AssertionError


def kill(seed: int) -> dict[str, Any]:
    """One kill: who and when, and what the survivors said and how long that took them."""
    chance = random.Random(seed)
    lost, connecting = chance.randrange(WORLD_SIZE), chance.random() < 0.15
    pool = Ranks(WORLD_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        try:
            pool.run(int)
            pool.start(until_lost, Path(folder), seed, CONNECTING_S if connecting else 60.0)
            while not connecting and len(list(Path(folder).iterdir())) < WORLD_SIZE:
                time.sleep(0.001)
            time.sleep(chance.random() * (0.03 if connecting else 0.2))
            killed = time.time()
            os.kill(pool.processes[lost].pid, signal.SIGKILL)
            said = [pool.result(rank) for rank in range(WORLD_SIZE) if rank != lost]
        except (TimeoutError, AssertionError) as error:
            return {"seed": seed, "lost": lost, "connecting": connecting, "failure": str(error)[-500:]}
        finally:
            pool.close()
    named = all(ranks == (lost,) for ranks, _ in said)
    return {
        "seed": seed,
        "lost": lost,
        "connecting": connecting,
        "seconds": max(knew - killed for _, knew in said),
        "failure": None if named else f"named {[ranks for ranks, _ in said]}",
    }


def connect_among_strangers(folder: Path) -> tuple[float, bool]:
    """Seconds that this rank took to connect once it might, and whether the sum is right. All may see its port."""
    rank, started = int(os.environ["RANK"]), 0.0
    meet, dial = Meeting.meet, Credentials.dial

    def note_and_meet(self: Meeting, timeout_s: float) -> dict[int, socket.socket]:
        nonlocal started
        (folder / f"port{rank}").write_text(str(self._listener.getsockname()[1]), encoding="ascii")
        if rank > 0:
            _wait_for(folder / f"go{rank}")
        started = time.monotonic()
        return meet(self, timeout_s)

    def note_and_dial(self: Credentials, peer: int) -> Steps:
        steps = dial(self, peer)
        said = next(steps)
        with contextlib.suppress(StopIteration):
            while True:
                heard = yield said
                said = steps.send(heard)
                if isinstance(said, bytes):
                    (folder / f"said{rank}to{peer}").write_bytes(said)
        return peer

    Meeting.meet, Credentials.dial = note_and_meet, note_and_dial  # type: ignore[method-assign]
    transport = TcpTransport(timeout_s=60)
    seconds = time.monotonic() - started
    inputs = [torch.randn(100, 70, generator=torch.Generator().manual_seed(peer)) for peer in range(WORLD_SIZE)]
    found = narrowcast.all_reduce(inputs[rank], codec=FP32, group=transport, algorithm="two_shot")
    return seconds, torch.equal(found, simulate.all_reduce(inputs, codec=FP32, algorithm="two_shot"))


class Strangers:
    """Who comes to the ports; `admitted` counts those that were answered with more than the greeting."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.came: Counter[str] = Counter()
        self.admitted = 0
        self._silent: list[socket.socket] = []

    def come(self, port: int, recorded: bytes | None) -> None:
        """One stranger of a random kind."""
        kinds: list[Callable[[socket.socket], None]] = [self.silence, self.garbage, self.reset, self.wrong_secret]
        kind = self.chance.choice([*kinds, *([self.replay] if recorded else [])])
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=2)
        except OSError:
            self.came["refused"] += 1
            return
        self.recorded = recorded or b""
        self.came[kind.__name__] += 1
        with contextlib.suppress(OSError):
            kind(connection)
        if kind != self.silence:
            connection.close()

    def silence(self, connection: socket.socket) -> None:
        self._silent.append(connection)
        if len(self._silent) > 2 * MAX_UNPROVEN:
            self._silent.pop(0).close()

    def garbage(self, connection: socket.socket) -> None:
        connection.sendall(self.chance.randbytes(self.chance.choice([1, 40, 96, 128, 5000])))
        self._listen(connection)

    def replay(self, connection: socket.socket) -> None:
        connection.sendall(self.recorded)
        self._listen(connection)

    def reset(self, connection: socket.socket) -> None:
        """Half a handshake, then a reset, or nothing more from a connection that is half-closed."""
        connection.sendall(self.recorded[:50] or b"narrow01")
        if self.chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.shutdown(socket.SHUT_WR)

    def wrong_secret(self, connection: socket.socket) -> None:
        mesh = self.recorded[8:24] or bytes(16)
        steps = Credentials(secret=bytes(32), mesh=mesh, rank=2).dial(0)
        next(steps)
        reply = steps.send(connection.recv(GREETING_NBYTES, socket.MSG_WAITALL))
        assert isinstance(reply, bytes)
        connection.sendall(reply)
        self.admitted += len(connection.recv(1)) > 0

    def _listen(self, connection: socket.socket) -> None:
        connection.settimeout(0.05)
        heard = 0
        while more := connection.recv(GREETING_NBYTES + 1):
            heard += len(more)
            self.admitted += heard > GREETING_NBYTES

    def leave(self) -> None:
        for connection in self._silent:
            connection.close()


def strangers(count: int, seed: int) -> dict[str, Any]:
    """Half of them before rank 1 has met rank 0, half of them between that and rank 2's coming."""
    pool = Ranks(WORLD_SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crowd = Strangers(seed)
        try:
            pool.start(connect_among_strangers, folder)
            _wait_for(folder / "port0")
            port = int((folder / "port0").read_text(encoding="ascii"))
            started = time.monotonic()
            while sum(crowd.came.values()) < count // 2:
                crowd.come(port, None)
            (folder / "go1").write_text("go", encoding="ascii")
            _wait_for(folder / "said1to0")
            recorded = (folder / "said1to0").read_bytes()
            while sum(crowd.came.values()) < count:
                crowd.come(port, recorded)
            seconds = time.monotonic() - started
            (folder / "go2").write_text("go", encoding="ascii")
            results = [pool.result(rank) for rank in range(WORLD_SIZE)]
        finally:
            crowd.leave()
            pool.close()
    return {
        "came": dict(crowd.came),
        "seconds": seconds,
        "admitted": crowd.admitted,
        "right_sums": sum(right for _, right in results),
        "last_rank_connected_in_seconds": results[2][0],
    }


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def kills(count: int, seed: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        row = kill(seed + index)
        if row["failure"]:
            print(row, flush=True)
        yield row


def main() -> None:
    import reporting  # which ranks, who import this file too, need not

    parser = reporting.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strangers", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = list(kills(arguments.kills, arguments.seed))
    failures = [row for row in rows if row["failure"]]
    at_work = [row["seconds"] for row in rows if not row["failure"] and not row["connecting"]]
    killed = {
        "count": len(rows),
        "while_connecting": sum(row["connecting"] for row in rows),
        "named_by_every_survivor": len(rows) - len(failures),
        "at_work_median_seconds": statistics.median(at_work) if at_work else None,
        "at_work_max_seconds": max(at_work, default=None),
        "failures": failures,
    }
    print(f"kills: {killed}", flush=True)
    met = strangers(arguments.strangers, arguments.seed) if arguments.strangers else None
    print(f"strangers: {met}")
    reporting.write(arguments.json, seed=arguments.seed, world_size=WORLD_SIZE, kills=killed, strangers=met)
    sys.exit(bool(failures) or (met is not None and (met["admitted"] > 0 or met["right_sums"] < WORLD_SIZE)))


if __name__ == "__main__":
    main()
