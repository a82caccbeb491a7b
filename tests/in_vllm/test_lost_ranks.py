"""A worker that is killed or stopped: the API says so, all processes end, with a status and the rank in the log."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from running import ended, serving

DEADLINE_S = 60  # for which ranks wait for each other
ENDING_S = 60  # in which vLLM ends those that do not end by themselves


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("sent", "rank", "within_s"), [(signal.SIGKILL, 1, 0), (signal.SIGSTOP, 0, DEADLINE_S)])
def test_a_lost_worker_ends_the_server(folder: Path, sent: signal.Signals, rank: int, within_s: int) -> None:
    """Of rank 0 vLLM awaits the answers, and hears nothing of what the other meets."""
    with serving(folder, NARROWCAST_PLAN=str(folder / "int4.plan")) as server:
        answers: list[tuple[int, str]] = []
        request = threading.Thread(target=lambda: answers.append(server.complete("It was", 500)))
        request.start()
        time.sleep(0.5)
        assert not answers
        lost_at = time.monotonic()
        os.kill(server.worker(rank), sent)
        request.join()
        assert server.process.wait(ENDING_S) == 1
        assert within_s - 1 < time.monotonic() - lost_at < within_s + ENDING_S
        ((status, _),) = answers
        assert status == 500
        assert f"lost rank {rank} while" in server.log
        assert ended(server.process.pid, within_s=5), "left behind"
