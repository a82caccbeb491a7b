"""Transports: what moves the bytes."""

from narrowcast.transport.base import CARD_NBYTES, Buffers, Collectives, Transport, Work
from narrowcast.transport.choice import TRANSPORTS, Groups, check_transport, connect_group, transports_of
from narrowcast.transport.group import DEFAULT_TIMEOUT_S, check_timeout
from narrowcast.transport.tcp import TcpTransport
from narrowcast.transport.torch_distributed import TorchDistributedTransport, connect

__all__ = [
    "CARD_NBYTES",
    "DEFAULT_TIMEOUT_S",
    "TRANSPORTS",
    "Buffers",
    "Collectives",
    "Groups",
    "TcpTransport",
    "TorchDistributedTransport",
    "Transport",
    "Work",
    "check_timeout",
    "check_transport",
    "connect",
    "connect_group",
    "transports_of",
]
