"""Transports: what moves the bytes."""

from narrowcast.transport.base import Buffers, Collectives, Transport, Work
from narrowcast.transport.torch_distributed import DEFAULT_TIMEOUT_S, TorchDistributedTransport, connect

__all__ = ["DEFAULT_TIMEOUT_S", "Buffers", "Collectives", "TorchDistributedTransport", "Transport", "Work", "connect"]
