"""Ranks that are processes of their own: each leaves its snapshot in a folder, and whoever answers /metrics reads all.

Whoever is asked so never asks a rank, which may be at work, or stopped.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.registry import Collector

from narrowcast.errors import InvalidInputError
from narrowcast.monitoring.snapshot import Snapshot

logger = logging.getLogger(__name__)

EVERY_S = 5.0


def leave_in(folder: Path, snapshot: Callable[[], Snapshot], *, every_s: float = EVERY_S) -> None:
    """Have a thread keep this process's snapshot in `folder`, which is made, and written to only where it has changed.

    The thread ends when the folder is gone.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{os.getpid()}.json"

    def keep() -> None:
        left = None
        while folder.exists():
            if (found := snapshot()) != left:
                whole = path.with_suffix(".new")
                whole.write_text(found.to_text(), encoding="utf8")
                whole.replace(path)
                left = found
            time.sleep(every_s)

    def tell() -> None:
        try:
            keep()
        except FileNotFoundError:  # gone just now
            return
        except OSError as error:
            logger.warning("the figures of this rank are told no longer: %s", error)

    threading.Thread(target=tell, name="narrowcast-figures", daemon=True).start()


def left_in(folder: Path) -> list[Snapshot]:
    """The snapshots of all processes that run, in the order of their ranks. Files of others are removed."""
    found = []
    for path in folder.glob("*.json"):
        if not _runs(int(path.stem)):
            path.unlink(missing_ok=True)
            continue
        with suppress(FileNotFoundError):  # removed by another reader just now
            found.append(Snapshot.from_text(path.read_text(encoding="utf8")))
    return sorted(found, key=lambda snapshot: snapshot.rank)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def show(collector: Collector) -> None:
    """Add a collector to whatever this process shows of prometheus_client's metrics.

    Where several processes answer for each other (PROMETHEUS_MULTIPROC_DIR), they make a registry for each answer.
    """
    prometheus_client.REGISTRY.register(collector)

    class OfAllProcesses(multiprocess.MultiProcessCollector):
        def __init__(self, registry: CollectorRegistry | None, path: Any = None) -> None:
            super().__init__(registry, path)  # type: ignore[no-untyped-call]
            if registry is not None:
                registry.register(collector)

    multiprocess.MultiProcessCollector = OfAllProcesses  # type: ignore[misc]


def listen(port: int, collector: Collector) -> None:
    """Answer on `port`, on all addresses, with what the collector has. InvalidInputError if somebody else does."""
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        prometheus_client.start_http_server(port, registry=registry)
    except OSError as error:
        raise InvalidInputError(
            f"port {port}", expected="a free port", found=(error.strerror or str(error)).lower(), remedy="Name another."
        ) from error
