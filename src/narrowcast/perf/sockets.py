"""The yardstick for transports: plain TCP sockets between all ranks, and nothing but bytes on them."""

import select
import socket
from collections.abc import Callable

import torch.distributed as dist

from narrowcast.transport import TorchDistributedTransport
from narrowcast.transport.address import own_address

CHUNK = 1 << 20


class SocketMesh:
    """A connection from this rank to every other one of the default group; PeerLostError if one is lost."""

    def __init__(self) -> None:
        self._ranks = TorchDistributedTransport()
        rank, world_size, timeout_s = self._ranks.rank, self._ranks.world_size, self._ranks.timeout_s
        with socket.create_server((own_address(None), 0)) as server:
            addresses: list[tuple[str, int]] = [("", 0)] * world_size
            dist.all_gather_object(addresses, server.getsockname())
            server.settimeout(timeout_s)
            self._peers = [socket.create_connection(address, timeout_s) for address in addresses[:rank]]
            self._peers += [server.accept()[0] for _ in addresses[rank + 1 :]]
        for peer in self._peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)
        self._out, self._in = memoryview(bytes(CHUNK)), memoryview(bytearray(CHUNK))

    def exchange(self, nbytes: int) -> None:
        """Send `nbytes` to every peer and receive as many from each."""
        unsent, unseen = (dict.fromkeys(self._peers, nbytes) for _ in range(2))
        try:
            while unsent or unseen:
                moved = _some(unsent, lambda peer, left: peer.send(self._out[:left]))
                moved += _some(unseen, lambda peer, left: peer.recv_into(self._in, min(left, CHUNK)))
                if not moved:
                    _wait(unsent, unseen, self._ranks.timeout_s)
        except OSError as error:
            raise self._ranks.missed() from error

    def close(self) -> None:
        """Close all connections."""
        for peer in self._peers:
            peer.close()


def _some(left: dict[socket.socket, int], move: Callable[[socket.socket, int], int]) -> int:
    """Move to or from each peer what it takes at once; how many bytes those were."""
    total = 0
    for peer, nbytes in list(left.items()):
        try:
            moved = move(peer, nbytes)
        except BlockingIOError:
            continue
        if not moved:
            raise ConnectionResetError("a rank closed its socket")
        total += moved
        left[peer] -= moved
        if not left[peer]:
            del left[peer]
    return total


def _wait(unsent: dict[socket.socket, int], unseen: dict[socket.socket, int], timeout_s: float) -> None:
    poll = select.poll()
    for peer in unsent.keys() | unseen.keys():
        poll.register(peer, select.POLLOUT * (peer in unsent) | select.POLLIN * (peer in unseen))
    if not poll.poll(timeout_s * 1000):
        raise TimeoutError("no rank sent or took a byte")
