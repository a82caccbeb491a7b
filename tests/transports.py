"""Transports that tests run over: what holds over one must hold over the other."""

import pytest

from narrowcast.transport import TcpTransport, TorchDistributedTransport, Transport
from narrowcast.transport.tcp import COMPILED

Kind = type[Transport]

GLOO: Kind = TorchDistributedTransport
TCP: Kind = TcpTransport
needs_mesh = pytest.mark.skipif(not COMPILED, reason="needs the compiled module")
over_both = pytest.mark.parametrize("kind", [GLOO, pytest.param(TCP, marks=needs_mesh)])
