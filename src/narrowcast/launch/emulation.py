"""Ranks in network namespaces of their own, joined by emulated links (csrc/emulator/).

Nothing of it has a name, and nothing of it outlives the process that started it, however that one ends.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.launch.link import Link
from narrowcast.launch.parent import end_with_parent

DEVICE = "link0"
QUEUE_BYTES = 4_000_000
MAX_RANKS = 254
TUN = Path("/dev/net/tun")

# A larger packet costs no more work than a small one, so that a fast link needs large ones: by rates up to which.
MTUS = (300e6, 1500), (2e9, 9000), (float("inf"), 65000)


def address_of(rank: int) -> str:
    """The address of a rank in its namespace; the emulator finds the rank by the last byte."""
    return f"10.78.0.{rank + 1}"


def mtu_of(link: Link) -> int:
    """Bytes of the largest packet on `link`."""
    return next(mtu for rate_bps, mtu in MTUS if link.rate_bps <= rate_bps)


def check_possible(world_size: int) -> None:
    """InvalidInputError unless links between `world_size` ranks can be emulated here."""
    if os.geteuid() != 0:
        raise InvalidInputError(
            "--link",
            expected="root, which network namespaces need",
            found=f"user {os.geteuid()}",
            remedy="Run it as root, or without --link.",
        )
    if world_size > MAX_RANKS:
        raise InvalidInputError("--link", expected=f"at most {MAX_RANKS} ranks", found=world_size, remedy="Use fewer.")
    if not TUN.exists():
        raise InvalidInputError(
            "--link", expected=f"the device {TUN}", found="none", remedy="Give the container that device."
        )
    try:
        import narrowcast._emulator  # noqa: F401
    except ImportError as error:
        raise InvalidInputError(
            "--link",
            expected="the compiled module narrowcast._emulator",
            found="an install without it",
            remedy="Install a C++ compiler and narrowcast again.",
        ) from error


@contextmanager
def emulated(link: Link, world_size: int, context: ForkServerContext) -> Iterator[tuple[BaseProcess, list[Connection]]]:
    """The emulator's process, and for each rank the end of a pipe that it passes to `join`."""
    pipes = [context.Pipe() for _ in range(world_size)]
    ours, theirs = [pipe[0] for pipe in pipes], [pipe[1] for pipe in pipes]
    process = context.Process(target=_emulate, args=(link, ours), daemon=True)
    process.start()
    try:
        yield process, theirs
    finally:
        for end in (*ours, *theirs):
            end.close()
        process.kill()
        process.join()


def join(link: Link, rank: int, pipe: Connection) -> None:
    """Move this process, which has no other threads that use the network yet, into its own namespace on the link."""
    from narrowcast import _emulator

    try:
        device = _emulator.enter_namespace(address_of(rank), mtu_of(link))
    except RuntimeError as error:
        raise NarrowcastError(f"the link cannot be emulated here: {error}") from error
    try:
        reduction.send_handle(pipe, device, None)
    finally:
        os.close(device)
        pipe.close()


def _emulate(link: Link, pipes: Sequence[Connection]) -> None:
    end_with_parent()
    from narrowcast import _emulator

    with contextlib.suppress(EOFError):  # a rank that ended before it came: whoever started it says so
        devices = [reduction.recv_handle(pipe) for pipe in pipes]
        _emulator.carry(devices, link.rate_bps, link.delay_s, QUEUE_BYTES)
