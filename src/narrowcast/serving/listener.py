"""Where a server listens."""

import socket
from contextlib import ExitStack
from typing import Any

from narrowcast.errors import InvalidInputError

UNIX = "unix:"  # in place of a host: a path in the file system, which other network namespaces see, too


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, at which nobody is listened to yet."""
    try:
        family, address = _address(host, port)
        with ExitStack() as failing:
            listener = failing.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            failing.pop_all()
    except OSError as error:
        raise InvalidInputError(
            "--host and --port",
            expected="a free port at an address of this machine",
            found=f"{host}:{port} ({error.strerror})",
            remedy="Choose others.",
        ) from error
    return listener


def _address(host: str, port: int) -> tuple[int, Any]:
    if host.startswith(UNIX):
        return socket.AF_UNIX, host.removeprefix(UNIX)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address


def url_of(listener: socket.socket) -> str:
    """The address of the API there."""
    if listener.family == socket.AF_UNIX:
        return f"{UNIX}{listener.getsockname()}"
    host, port, *_ = listener.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
