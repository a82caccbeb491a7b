"""A full mesh of TCP connections of our own, for CPU tensors: a message costs a fraction of what gloo takes.

Its data path is compiled (csrc/mesh/mesh.h); who may join it is decided here and in `handshake`.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.transport.address import REMEDY, Host, check_reachable, check_refusals, listen, own_address
from narrowcast.transport.base import CARD_NBYTES, Buffers
from narrowcast.transport.group import GroupTransport, hang_ups
from narrowcast.transport.handshake import Credentials, Meeting, drawn
from narrowcast.transport.waiting import LINGER_S

try:
    from narrowcast import _native
except ImportError:
    COMPILED = False
else:
    COMPILED = True
    hang_ups.append(_native.hang_up)

_CONNECTING = "connecting to each other"

# A group's connections are made once, and closed when the group goes.
_meshes: "WeakKeyDictionary[dist.ProcessGroup, _native.Mesh]" = WeakKeyDictionary()


class TcpTransport(GroupTransport):
    """The ranks of `group` (None: the default group), each connected to each; all of them make it at the same time.

    `interface`: the network interface (or address) that the connections take, by default that of GLOO_SOCKET_IFNAME,
    else the one towards MASTER_ADDR. A wait lasts `timeout_s` seconds at most; by default as long as other transports'.
    Raises InvalidInputError on every rank if one of them has no compiled module or cannot be reached.
    """

    name = "tcp"
    chunk_values = 1 << 18  # 128 KiB at 4 bits

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        interface: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(group, timeout_s=timeout_s)
        if self.group not in _meshes:
            _meshes[self.group] = self._connect(interface)
        self._mesh = _meshes[self.group]

    def exchange(self, sends: Buffers, recvs: Buffers, *, tag: int) -> "TcpWork":
        return TcpWork(self, self._mesh.exchange(travelling(sends), travelling(recvs), tag, (*sends, *recvs)))

    def recorded_sum(self, kept: object) -> "_native.Sum":
        """A sum over these connections, still without steps; `kept` lives as long as it or what it sends."""
        return _native.Sum(self._mesh, kept)

    def _connect(self, interface: str | None) -> "_native.Mesh":
        listener, mine = None, self._card()
        try:
            if not COMPILED:
                raise missing_module()
            listener = listen(own_address(interface))
            mine["address"], mine["port"] = listener.getsockname()[:2]
        except InvalidInputError as error:
            mine["refusal"] = str(error)
        try:
            cards = [json.loads(text) for text in self.share(json.dumps(mine), _CONNECTING)]
            _check(cards)
            assert listener is not None, "without one there was a refusal"
            credentials = Credentials.of(cards[0], self.rank)
            addresses = {peer: (card["address"], card["port"]) for peer, card in enumerate(cards)}
            meeting = Meeting(credentials, listener, addresses)
            meeting.meet(self.timeout_s)
            self._agree_to_start(meeting, [card["address"] for card in cards])
        finally:
            if listener is not None:
                listener.close()
        return mesh_of(meeting.met, [card["machine"] for card in cards])

    def _card(self) -> dict[str, Any]:
        """The card that the others need of this rank; the secret is rank 0's."""
        host = Host.this()
        card: dict[str, Any] = {"refusal": None, "network": host.network, "machine": host.machine}
        if self.rank == 0:
            card |= drawn()
        return card

    def _agree_to_start(self, meeting: Meeting, addresses: Sequence[str]) -> None:
        """PeerLostError on every rank if any is lost, InvalidInputError if they are there and have not all met."""
        timeout_s = LINGER_S if meeting.missing else None
        try:
            texts = self.share(json.dumps(meeting.missing), _CONNECTING, timeout_s=timeout_s)
            for rank, unmet in enumerate(map(json.loads, texts)):
                for peer in [peer for peer in unmet if peer < rank]:  # whom it dials
                    raise InvalidInputError(
                        "TCP transport",
                        expected="ranks that reach each other",
                        found=f"that rank {rank} of the group does not reach rank {peer} on {addresses[peer]}",
                        remedy=REMEDY,
                    )
        except NarrowcastError:
            for connection in meeting.met.values():
                connection.close()
            raise

    def failed(self, outcome: tuple[str, int, str, int, int]) -> NarrowcastError:
        """The error for what went wrong with an exchange."""
        trouble, peer, reason, found, expected = outcome
        if trouble == "mismatch":
            compared = CARD_NBYTES in (found, expected)
            new = f" ({CARD_NBYTES} bytes compare codecs that are new to one)" if compared else ""
            return InvalidInputError(
                f"payload of rank {self.global_ranks[peer]}",
                expected=f"{expected} bytes, as this rank receives",
                found=f"{found} bytes, as that rank sent",
                remedy=f"Call the collective with the same shapes and codecs on every rank{new}.",
            )
        error = self.lost(peer)
        error.__cause__ = ConnectionError(f"rank {self.global_ranks[peer]}: {reason}")
        return error


@dataclass(slots=True)
class TcpWork:
    """An exchange under way. Its buffers live as long as bytes may travel, even if nobody waits."""

    transport: TcpTransport
    exchange: "_native.Exchange"

    def wait(self) -> None:
        """Return when all has arrived and been sent; PeerLostError if a peer is lost or the deadline passes.

        InvalidInputError if a peer sent another number of bytes than this rank receives.
        """
        outcome = self.exchange.wait(self.transport.timeout_s)
        if outcome is not None:
            raise self.transport.failed(outcome)


def missing_module() -> InvalidInputError:
    """The error for a rank that cannot run the mesh."""
    return InvalidInputError(
        "TCP transport",
        expected="the compiled module narrowcast._native",
        found="an installation without it",
        remedy="Install narrowcast where there is a C++ compiler, or take another transport: torch.",
    )


def _check(cards: list[dict[str, Any]]) -> None:
    """InvalidInputError, alike on every rank, if one of them refused or cannot be reached."""
    check_refusals("TCP transport", [card["refusal"] for card in cards])
    check_reachable("TCP transport", [card["address"] for card in cards], [card["network"] for card in cards])


def mesh_of(met: Mapping[int, socket.socket], machines: Sequence[str]) -> "_native.Mesh":
    """The mesh of ranks on these machines whose connections, by peer, it takes over; with others there is none."""
    fds = [met[peer].detach() if peer in met else -1 for peer in range(len(machines))]
    return _native.Mesh(fds, spin=_has_cores_to_spare(machines))


def _has_cores_to_spare(machines: Sequence[str]) -> bool:
    """True if the ranks on this machine may spin: each has a core of its own."""
    here = max(machines.count(Host.this().machine), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return here <= len(os.sched_getaffinity(0))


def travelling(buffers: Buffers) -> list[tuple[int, int, int]]:
    """Peer, address and bytes of each buffer that is not empty."""
    found = []
    for peer, buffer in enumerate(buffers):
        if buffer is not None and (nbytes := buffer.nbytes):
            assert buffer.is_cpu and buffer.is_contiguous(), "the mesh moves contiguous tensors of the CPU"
            found.append((peer, buffer.data_ptr(), nbytes))
    return found
