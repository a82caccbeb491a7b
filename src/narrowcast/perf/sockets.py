"""The yardstick for transports: plain TCP sockets between all ranks, and nothing but bytes on them."""

import select
import socket
from collections.abc import Callable

import torch.distributed as dist

from narrowcast.transport.address import own_address

CHUNK = 1 << 20
TIMEOUT_MS = 60_000


class SocketMesh:
    """A connection from this rank to every other one of the default group."""

    def __init__(self) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        with socket.create_server((own_address(None), 0)) as server:
            addresses: list[tuple[str, int]] = [("", 0)] * world_size
            dist.all_gather_object(addresses, server.getsockname())
            self._peers = [socket.create_connection(address) for address in addresses[:rank]]
            self._peers += [server.accept()[0] for _ in addresses[rank + 1 :]]
        for peer in self._peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)
        self._out, self._in = memoryview(bytes(CHUNK)), memoryview(bytearray(CHUNK))

    def exchange(self, nbytes: int) -> None:
        """Send `nbytes` to every peer and receive as many from each."""
        unsent, unseen = (dict.fromkeys(self._peers, nbytes) for _ in range(2))
        while unsent or unseen:
            moved = _some(unsent, lambda peer, left: peer.send(self._out[:left]))
            moved += _some(unseen, lambda peer, left: peer.recv_into(self._in, min(left, CHUNK)))
            if not moved:
                _wait(unsent, unseen)

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


def _wait(unsent: dict[socket.socket, int], unseen: dict[socket.socket, int]) -> None:
    poll = select.poll()
    for peer in unsent.keys() | unseen.keys():
        poll.register(peer, select.POLLOUT * (peer in unsent) | select.POLLIN * (peer in unseen))
    if not poll.poll(TIMEOUT_MS):
        raise TimeoutError("no rank sent or took a byte")
