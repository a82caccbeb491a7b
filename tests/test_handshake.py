"""Who meets whom: strangers stay out of a mesh, ranks get in, and each listens on one interface."""

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from narrowcast.errors import InvalidInputError
from narrowcast.transport.address import listen, own_address
from narrowcast.transport.handshake import MAGIC, MAX_UNPROVEN, PROOF_S, Address, Credentials, Meeting


def credentials(rank: int, *, secret: bytes = b"s" * 32, mesh: bytes = b"m" * 16) -> Credentials:
    return Credentials(secret=secret, mesh=mesh, rank=rank)


class Doorway:
    """A rank 0 that waits for rank 1 in a thread of its own."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        listener = listen("127.0.0.1")
        self.address: Address = listener.getsockname()
        self.meeting = Meeting(credentials(0), listener, {0: self.address, 1: ("127.0.0.1", 1)})
        self.thread = threading.Thread(target=self.meeting.meet, args=(timeout_s,))
        self.thread.start()

    def knock(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)

    def enter(self, who: Credentials, timeout_s: float = 10.0) -> bool:
        """True if `who` gets in."""
        met = Meeting(who, listen("127.0.0.1"), {0: self.address}).meet(timeout_s)
        for connection in met.values():
            connection.close()
        return bool(met)

    def close(self) -> None:
        self.thread.join()
        for connection in self.meeting.met.values():
            connection.close()


@pytest.fixture
def doorway() -> Iterator[Doorway]:
    doorway = Doorway()
    yield doorway
    doorway.close()


def dropped(connection: socket.socket) -> bool:
    """True if the other end has closed the connection without another byte than its greeting."""
    greeting = connection.recv(40, socket.MSG_WAITALL)
    try:
        return len(greeting) == 40 and connection.recv(1) == b""
    except ConnectionResetError:
        return True
    finally:
        connection.close()


def test_strangers_stay_out_and_the_rank_gets_in(doorway: Doorway) -> None:
    """Silence, garbage, half a handshake, who hangs up, and the right protocol with a wrong secret."""
    kept = [doorway.knock() for _ in range(MAX_UNPROVEN + 50)]
    kept[0].settimeout(PROOF_S / 2)
    assert dropped(kept[0])  # the oldest of too many, long before its time is up
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 20, b"\0" * 200, os.urandom(500)):
        stranger = doorway.knock()
        stranger.sendall(garbage)
        assert dropped(stranger)
    reset = doorway.knock()
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    for impostor in (credentials(1, secret=b"x" * 32), credentials(1, mesh=b"n" * 16), credentials(2)):
        assert not doorway.enter(impostor, 0.3)
    assert doorway.enter(credentials(1))
    for connection in kept[1:]:
        connection.close()


def test_a_proof_for_another_end_opens_nothing(doorway: Doorway) -> None:
    """Not even by the right secret: of rank 0 itself, of a rank that is none, in the other direction, to another."""
    for role, rank, to in ((b"dial", 0, 0), (b"dial", 1 << 31, 0), (b"accept", 1, 0), (b"dial", 1, 2)):
        stranger = doorway.knock()
        nonces = b"n" * 32, stranger.recv(40, socket.MSG_WAITALL)[8:]
        proof = credentials(rank).proof(role, rank, to, nonces)
        stranger.sendall(struct.pack("<8s16sII32s32s", MAGIC, b"m" * 16, rank, 0, nonces[0], proof))
        assert stranger.recv(1) == b""
        stranger.close()
    assert doorway.enter(credentials(1))


def record_handshake(doorway: Doorway) -> bytes:
    """Record the words of a rank that gets in."""
    connection = doorway.knock()
    steps = credentials(1).dial(0)
    next(steps)
    said = steps.send(connection.recv(40, socket.MSG_WAITALL))
    assert isinstance(said, bytes)
    connection.sendall(said)
    assert len(connection.recv(32, socket.MSG_WAITALL)) == 32
    connection.close()
    return said


def test_a_replayed_handshake_opens_nothing(doorway: Doorway) -> None:
    said = record_handshake(doorway)
    again = Doorway()
    for _ in range(3):
        stranger = again.knock()
        stranger.sendall(said)
        assert dropped(stranger)
    assert again.enter(credentials(1))
    again.close()


def test_nobody_comes_in_to_a_dialling_rank() -> None:
    """Who listens where rank 0 should be, and does not know the secret, is not taken for it."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(5)

    def pretend() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(struct.pack("<8s32s", MAGIC, b"n" * 32))
            reply = connection.recv(96, socket.MSG_WAITALL)
            connection.sendall(reply[-32:])  # its own proof, reflected
            assert connection.recv(1) == b""

    thread = threading.Thread(target=pretend)
    thread.start()
    assert Meeting(credentials(1), listen("127.0.0.1"), {0: listener.getsockname()}).meet(0.5) == {}
    thread.join()
    listener.close()


def test_who_is_met_while_dialling_is_not_waited_for(doorway: Doorway) -> None:
    """The other end may be so fast that the whole handshake passes before this one first looks for events."""
    meeting = Meeting(credentials(1), listen("127.0.0.1"), {0: doorway.address})
    go_on = meeting._go_on

    def go_on_to_the_end(talk: Any) -> None:
        while talk in meeting._talks:
            go_on(talk)

    meeting._go_on = go_on_to_the_end  # type: ignore[method-assign]
    started = time.monotonic()
    meeting.meet(10.0)[0].close()
    assert time.monotonic() - started < 5


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert own_address(None) == own_address("lo") == own_address("127.0.0.1") == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert own_address(None) in ("127.0.0.1", "::1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0,lo")
    with pytest.raises(InvalidInputError, match=r"a network interface of this host \(lo.*found 'nosuch0'"):
        own_address(None)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for everywhere in ("0.0.0.0", "::", "203.0.113.7"):
        with pytest.raises(InvalidInputError, match="one of their addresses"):
            listen(own_address(everywhere))
