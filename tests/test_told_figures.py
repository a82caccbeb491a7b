"""Figures of ranks that are processes of their own: left in a folder, shown by another process, or told on a port."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from narrowcast.errors import InvalidInputError
from narrowcast.monitoring import Snapshot, processes
from narrowcast.monitoring.metrics import collector_of
from narrowcast.runtime.reports import Report, SiteReport

SHOWN = 'narrowcast_tokens_total{rank="%d"} %d'


def snapshot(num_tokens: int, rank: int = 0) -> Snapshot:
    site = SiteReport(coded=True, num_tokens=num_tokens, wire_bytes=0, plain_bytes=0, num_values=0)
    return Snapshot.of(Report(sites={"a": site}), None, rank=rank, num_ranks=2, transport="tcp")


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_process_leaves_what_has_changed(tmp_path: Path) -> None:
    figures, asked, folder = [snapshot(1)], [], tmp_path / "figures"

    def now() -> Snapshot:
        asked.append(True)
        return figures[-1]

    processes.leave_in(folder, now, every_s=0.01)
    assert soon(lambda: processes.left_in(folder) == [figures[0]])
    (file,) = folder.iterdir()
    assert folder.stat().st_mode & 0o077 == 0, "nobody else's business"
    before = file.stat().st_ino
    assert soon(lambda: len(asked) > 5)
    assert file.stat().st_ino == before, "not written anew"
    figures.append(snapshot(2))
    assert soon(lambda: processes.left_in(folder) == [figures[1]])
    file.unlink()
    folder.rmdir()
    time.sleep(0.1)
    before = len(asked)
    time.sleep(0.1)
    assert len(asked) == before, "nobody reads it any more"


def test_what_an_ended_process_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getpid()):
        (tmp_path / f"{process}.json").write_text(snapshot(1).to_text())
    assert processes.left_in(tmp_path) == [snapshot(1)]
    assert [path.stem for path in tmp_path.iterdir()] == [str(os.getpid())]
    assert processes.left_in(tmp_path / "of ranks that have not begun") == []


def test_they_are_shown_beside_what_else_a_process_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several processes answer for each other."""
    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(multiprocess, "MultiProcessCollector", multiprocess.MultiProcessCollector)
    processes.show(collector_of(lambda: [snapshot(1), snapshot(3, rank=1)]))
    of_all_processes = CollectorRegistry()
    multiprocess.MultiProcessCollector(of_all_processes, str(tmp_path))
    for each in (registry, of_all_processes):
        shown = generate_latest(each).decode()
        assert all(SHOWN % figures in shown for figures in ((0, 1), (1, 3)))


def test_a_rank_tells_its_own_on_a_port() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(InvalidInputError, match=f"port {port}: expected a free port, found address already in use"):
            processes.listen(port, collector_of(list))
    processes.listen(port, collector_of(lambda: [snapshot(5, rank=1)]))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert SHOWN % (1, 5) in answer.read().decode()
