"""The meeting of a mesh's ranks: each listens, dials those below it, and both ends prove that they know a secret.

    accepting end -> dialling end    magic, nonce
    dialling end -> accepting end    magic, mesh, its rank, the other's rank, its own nonce, proof
    accepting end -> dialling end    proof

A proof is the HMAC-SHA256, by the mesh's secret, of who gives it (dialling or accepting), the mesh, both ranks and both
nonces: it is of no use to another end, in another direction, to another mesh or at another time. Nothing else is read
before it was checked. Who does not prove in time, or first of too many at once, is dropped; a rank that this
happens to dials again.
"""

import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Container, Generator, Mapping
from dataclasses import dataclass, field

from narrowcast.transport.address import family_of

MAGIC = b"narrow01"
PROOF_S = 5.0  # for a whole handshake
MAX_UNPROVEN = 128  # connections at once
_REDIAL_S = 0.05
_ACCEPTS_A_TURN = 64
_GREETING = struct.Struct("<8s32s")
_REPLY = struct.Struct("<8s16sII32s32s")
_PROVEN = struct.Struct("<8s16sII32s32s")

Address = tuple[str, int]
# Yields bytes to send, or how many to receive; returns the peer.
Steps = Generator[bytes | int, bytes, int]


class StrangerError(Exception):
    """The other end has not proven that it is a rank of this mesh."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Who this rank is: `secret` (32 bytes) and `mesh` (16 bytes) are those of all ranks of one mesh."""

    secret: bytes
    mesh: bytes
    rank: int

    @classmethod
    def of(cls, drawn: Mapping[str, str], rank: int) -> "Credentials":
        """Those of a rank of the mesh for which one of its ranks has drawn this."""
        return cls(secret=bytes.fromhex(drawn["secret"]), mesh=bytes.fromhex(drawn["mesh"]), rank=rank)

    def proof(self, role: bytes, dialling: int, accepting: int, nonces: tuple[bytes, bytes]) -> bytes:
        """The proof of the end with that role; `nonces`: of the dialling end, of the accepting end."""
        return hmac.digest(self.secret, _PROVEN.pack(role, self.mesh, dialling, accepting, *nonces), "sha256")

    def accept(self, peers: Container[int]) -> Steps:
        """The accepting end, for one of the `peers`."""
        nonce = secrets.token_bytes(32)
        yield _GREETING.pack(MAGIC, nonce)
        magic, mesh, peer, me, theirs, proof = _REPLY.unpack((yield _REPLY.size))
        expected = self.proof(b"dial", peer, self.rank, (theirs, nonce))
        known = (magic, mesh, me) == (MAGIC, self.mesh, self.rank) and peer in peers
        if not (hmac.compare_digest(proof, expected) and known):
            raise StrangerError
        yield self.proof(b"accept", peer, self.rank, (theirs, nonce))
        return int(peer)

    def dial(self, peer: int) -> Steps:
        """The dialling end."""
        magic, theirs = _GREETING.unpack((yield _GREETING.size))
        if magic != MAGIC:
            raise StrangerError
        nonce = secrets.token_bytes(32)
        mine = self.proof(b"dial", self.rank, peer, (nonce, theirs))
        yield _REPLY.pack(MAGIC, self.mesh, self.rank, peer, nonce, mine)
        expected = self.proof(b"accept", self.rank, peer, (nonce, theirs))
        if not hmac.compare_digest((yield len(expected)), expected):
            raise StrangerError
        return peer


def drawn() -> dict[str, str]:
    """A new mesh, as text that its ranks share, and nobody else."""
    return {"secret": secrets.token_hex(32), "mesh": secrets.token_hex(16)}


@dataclass(eq=False)
class _Talk:
    """A connection that is not proven yet; `peer`: whom it dials."""

    connection: socket.socket
    steps: Steps
    deadline: float
    peer: int | None = None
    wanted: int = 0
    received: bytearray = field(default_factory=bytearray)


class Meeting:
    """Meets all peers: `addresses` by rank. `met` are the proven connections so far."""

    def __init__(self, credentials: Credentials, listener: socket.socket, addresses: Mapping[int, Address]) -> None:
        self._credentials, self._listener, self._addresses = credentials, listener, addresses
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._talks: dict[_Talk, None] = {}  # in order of age
        self._callers = {peer for peer in addresses if peer > credentials.rank}
        self._dials = {peer: 0.0 for peer in addresses if peer < credentials.rank}  # when to dial
        self.met: dict[int, socket.socket] = {}

    @property
    def missing(self) -> list[int]:
        """The ranks that are not met yet."""
        return [peer for peer in self._addresses if peer not in self.met and peer != self._credentials.rank]

    def meet(self, timeout_s: float) -> dict[int, socket.socket]:
        """Connections by peer, of as many as come in time."""
        deadline = time.monotonic() + timeout_s
        try:
            while self.missing and (now := time.monotonic()) < deadline:
                self._dial_due(now)
                for talk in [talk for talk in self._talks if talk.deadline <= now]:
                    self._drop(talk)
                for key, _ in self._selector.select(self._patience(now, deadline)):
                    if key.data is None:
                        self._accept()
                    elif key.data in self._talks:
                        self._go_on(key.data)
        finally:
            for talk in list(self._talks):
                self._drop(talk)
            self._selector.close()
            self._listener.close()
        return self.met

    def _patience(self, now: float, deadline: float) -> float:
        if not self.missing:  # the last one was met while dialling
            return 0.0
        oldest = next(iter(self._talks), None)
        times = [deadline, *self._dials.values(), *([oldest.deadline] if oldest else [])]
        return max(min(times) - now, 0.0)

    def _dial_due(self, now: float) -> None:
        for peer in [peer for peer, due in self._dials.items() if due <= now]:
            del self._dials[peer]
            connection = socket.socket(family_of(self._addresses[peer][0]), socket.SOCK_STREAM)
            connection.setblocking(False)
            talk = _Talk(connection, self._credentials.dial(peer), now + PROOF_S, peer)
            self._talks[talk] = None
            self._selector.register(connection, selectors.EVENT_READ, talk)
            connection.connect_ex(self._addresses[peer])  # what goes wrong shows when reading
            self._go_on(talk)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody is left, or who was has gone again
                return
            connection.setblocking(False)
            talk = _Talk(connection, self._credentials.accept(self._callers), time.monotonic() + PROOF_S)
            self._talks[talk] = None
            self._selector.register(connection, selectors.EVENT_READ, talk)
            self._go_on(talk)
            unproven = [talk for talk in self._talks if talk.peer is None]
            if len(unproven) > MAX_UNPROVEN:
                self._drop(unproven[0])

    def _go_on(self, talk: _Talk) -> None:
        """Take the handshake as far as it goes with what has arrived."""
        try:
            while True:
                if len(talk.received) < talk.wanted:
                    arrived = talk.connection.recv(talk.wanted - len(talk.received))
                    if not arrived:
                        raise ConnectionError
                    talk.received += arrived
                if len(talk.received) == talk.wanted:
                    self._step(talk)
        except BlockingIOError:
            return
        except StopIteration as end:
            self._welcome(talk, end.value)
        except (OSError, StrangerError):
            self._drop(talk)

    def _step(self, talk: _Talk) -> None:
        received, talk.received, talk.wanted = bytes(talk.received), bytearray(), 0
        step = talk.steps.send(received) if received else next(talk.steps)
        if isinstance(step, int):
            talk.wanted = step
        elif talk.connection.send(step) < len(step):  # so few bytes always fit
            raise ConnectionError

    def _welcome(self, talk: _Talk, peer: int) -> None:
        del self._talks[talk]
        self._selector.unregister(talk.connection)
        if peer in self.met:
            self.met[peer].close()  # its end has dialled again
        self.met[peer] = talk.connection

    def _drop(self, talk: _Talk) -> None:
        del self._talks[talk]
        self._selector.unregister(talk.connection)
        talk.connection.close()
        if talk.peer is not None:
            self._dials[talk.peer] = time.monotonic() + _REDIAL_S
