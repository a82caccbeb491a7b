"""The ways between ranks: who reaches whom, and how fast, over connections like those of the TCP transport."""

import contextlib
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from narrowcast.transport.tcp import travelling

if TYPE_CHECKING:
    from narrowcast import _native

Address = tuple[str, int]

REACH_S = 3.0  # until an address that says nothing cannot be reached
STALL_S = 5.0  # until bytes do not arrive
SMALLEST, GROWTH, LARGEST = 1 << 14, 4, 1 << 24  # bytes of a transfer: larger ones until they take long enough
NUM_PINGS, PINGS_S = 20, 0.2
TRANSFERS_S, LONGEST_S = 2.0, 0.2  # of the transfers of all rounds in one direction, of those of one
END = math.inf


@dataclass(frozen=True, kw_only=True, order=True)
class Pair:
    """Two ranks that have met: half a round trip, bits a second from the `low` rank to the `high` one, and back.

    `clock_s`: how far the clock of `high` is ahead. `stalled`: the step in which bytes did not arrive, "" for none.
    """

    low: int
    high: int
    latency_s: float | None = None
    clock_s: float | None = None
    there_bps: float | None = None
    back_bps: float | None = None
    stalled: str = ""


def unreached(rank: int, addresses: Mapping[int, Address]) -> dict[int, str]:
    """The reason by rank that does not even accept a connection of this one: nothing is sent."""
    others = [each for each in addresses if each != rank]
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        reasons = pool.map(_obstacle, (addresses[each] for each in others))
        return {other: reason for other, reason in zip(others, reasons, strict=True) if reason}


def _obstacle(address: Address) -> str:
    try:
        socket.create_connection(address, REACH_S).close()
    except OSError as error:
        return (error.strerror or "no answer").lower()
    return ""


def rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """All pairs, in rounds in which each rank has at most one: a circle that turns about its first place."""
    circle: list[int | None] = [*ranks, *([None] * (len(ranks) % 2))]
    found = []
    for _ in circle[1:]:
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def measured(mesh: "_native.Mesh", rank: int, met: Sequence[int], ranks: Sequence[int]) -> list[Pair]:
    """Pairs of which this rank is the lower one, of those with peers that it has `met`; all ranks call this."""
    order, found = rounds(ranks), []
    enough_s = min(LONGEST_S, TRANSFERS_S / len(order))
    for number, (low, high) in enumerate(pair for pairs in order for pair in pairs if rank in pair):
        peer = low + high - rank
        if peer not in met:
            continue
        patience_s = STALL_S * (number + 2)  # others may have waited in vain in each round before
        line = Line(mesh, peer)
        if rank == low:
            found.append(_lead(line, Pair(low=low, high=high), enough_s, patience_s))
        else:
            _follow(line, patience_s)
    return found


def longest_s(num_ranks: int) -> float:
    """Seconds that `measured` takes where in every round bytes do not arrive."""
    return 2 * STALL_S * num_ranks


class StalledError(Exception):
    """Bytes that do not arrive."""


class Line:
    """The connection to one peer, on which one end says something at a time."""

    def __init__(self, mesh: "_native.Mesh", peer: int) -> None:
        self._mesh, self._peer = mesh, peer
        self._buffer = torch.zeros(LARGEST, dtype=torch.uint8)

    def say(self, value: float) -> None:
        """Send a number, in a packet of the smallest size."""
        self._move(send=torch.tensor([value], dtype=torch.float64))

    def hear(self, within_s: float = STALL_S) -> float:
        """The number that the other end says."""
        self._move(into=(found := torch.empty(1, dtype=torch.float64)), within_s=within_s)
        return float(found)

    def send(self, nbytes: int) -> None:
        """Send so many bytes."""
        self._move(send=self._buffer[:nbytes])

    def receive(self, nbytes: int) -> None:
        """Take so many bytes."""
        self._move(into=self._buffer[:nbytes])

    def _move(self, *, send: Tensor | None = None, into: Tensor | None = None, within_s: float = STALL_S) -> None:
        sends, recvs = ([*[None] * self._peer, each] for each in (send, into))
        if self._mesh.exchange(travelling(sends), travelling(recvs), 0, (send, into)).wait(within_s) is not None:
            raise StalledError


def _lead(line: Line, pair: Pair, enough_s: float, patience_s: float) -> Pair:
    """Find out about a pair by telling its other end what to do: a number of bytes to take, or below 0 to send."""
    step = "small messages"
    try:
        line.say(0)
        line.hear(patience_s)
        trip_s, offset_s = min(_pings(line))  # the one that nothing else on the hosts has held up
        pair = replace(pair, latency_s=trip_s / 2, clock_s=offset_s)
        step = f"large messages from rank {pair.low} to rank {pair.high}"
        pair = replace(pair, there_bps=_rate(lambda nbytes: _push(line, nbytes), trip_s, enough_s))
        step = f"large messages from rank {pair.high} to rank {pair.low}"
        pair = replace(pair, back_bps=_rate(lambda nbytes: _pull(line, nbytes), trip_s, enough_s))
        line.say(END)
    except StalledError:
        return replace(pair, stalled=step)
    return pair


def _follow(line: Line, patience_s: float) -> None:
    with contextlib.suppress(StalledError):  # the other end tells
        order = line.hear(patience_s)
        while order != END:
            if order < 0:
                line.send(-int(order))
            else:
                line.receive(int(order))
                line.say(time.time())
            order = line.hear()


def _pings(line: Line) -> list[tuple[float, float]]:
    """Seconds of each round trip, and by how many the other end's clock is ahead."""
    found: list[tuple[float, float]] = []
    deadline = time.perf_counter() + PINGS_S
    while not found or (len(found) < NUM_PINGS and time.perf_counter() < deadline):
        wall_s, begun_s = time.time(), time.perf_counter()
        line.say(0)
        theirs_s = line.hear()
        trip_s = time.perf_counter() - begun_s
        found.append((trip_s, theirs_s - (wall_s + trip_s / 2)))
    return found


def _rate(transfer: Callable[[int], float], trip_s: float, enough_s: float) -> float:
    """Bits a second of the last of transfers, each larger than the one before, which takes long enough to tell."""
    nbytes, moving_s = SMALLEST, transfer(SMALLEST) - trip_s
    while moving_s < enough_s / GROWTH and nbytes < LARGEST:
        nbytes *= GROWTH
        moving_s = transfer(nbytes) - trip_s
    return 8 * nbytes / max(moving_s, 1e-9)


def _push(line: Line, nbytes: int) -> float:
    begun_s = time.perf_counter()
    line.say(nbytes)
    line.send(nbytes)
    line.hear()
    return time.perf_counter() - begun_s


def _pull(line: Line, nbytes: int) -> float:
    begun_s = time.perf_counter()
    line.say(-nbytes)
    line.receive(nbytes)
    return time.perf_counter() - begun_s
