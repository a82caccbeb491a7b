"""The commands of the tutorial, as they stand there: two machines are two launchers of one rank each."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from conftest import MODEL
from narrowcast import Plan

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def started(block: str, folder: Path) -> subprocess.Popen[str]:
    """A block of commands of this environment, on one thread each."""
    path = f"{Path(sys.executable).parent}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "CLONE": str(MODEL.parents[1]), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["bash", "-ec", block], cwd=folder, env=settings, text=True, **pipes)


def said(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    return out


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_two_machines(block: str, folder: Path) -> list[str]:
    """What the launchers print, at loopback and a free port."""
    block = block.replace("10.0.0.1", "127.0.0.1").replace("29500", str(free_port()))
    launchers = [started(block.replace("--node-rank 0", f"--node-rank {rank}"), folder) for rank in (0, 1)]
    return [said(each) for each in launchers]


@pytest.mark.slow
def test_its_commands_do_what_it_says(tmp_path: Path) -> None:
    *alone, generate, tune = BLOCKS
    doctor, _, estimated, calibrated, evaluated, generated = [said(started(block, tmp_path)) for block in alone]
    assert "transport tcp" in doctor and "3.37 and 1.92 times fewer" in estimated
    assert "allocated(target_kl=0.01)" in calibrated and "verdict: none noticed" in calibrated
    assert "verdict: none noticed" in evaluated and "16 sites" in evaluated
    assert generated.startswith(" ") and "It was a dark" not in generated
    assert on_two_machines(generate, tmp_path) == [generated, ""]
    first, second = on_two_machines(tune, tmp_path)
    assert "decisions written into tuned.plan" in first and "sums of 256 tokens: coded one_shot, " in first
    assert second == ""
    assert Plan.load(tmp_path / "tuned.plan").decisions.transport == "tcp"
