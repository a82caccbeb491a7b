"""The C++ mesh, small sums over it, and threads, under the address, undefined-behaviour and thread sanitizers.

Needs a compiler that has them.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
THREADS = CSRC / "kernels" / "threads.cpp"
MESH = [*(CSRC / "mesh").glob("*.cpp"), *(CSRC / "sums").glob("*.cpp"), THREADS]


def run_sanitized(program: str, sources: list[Path], sanitizers: str, what: list[str], tmp_path: Path) -> None:
    """Build tests/sanitized_PROGRAM.cpp with sources and run it with each of the arguments."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = [
        "-std=c++17",
        "-g",
        "-O1",
        f"-fsanitize={sanitizers}",
        f"-I{CSRC}",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    main = ROOT / "tests" / f"sanitized_{program}.cpp"
    built = subprocess.run([compiler, *flags, main, *sources, "-o", tmp_path / program], capture_output=True, text=True)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("needs a compiler with sanitizers")
    assert built.returncode == 0, built.stderr
    for each in what:
        done = subprocess.run([tmp_path / program, *each.split()], capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "what"),
    [
        ("address,undefined", ["fuzz 5000", "sums 2000"]),
        ("thread", ["threads 150", "sums 500"]),
    ],
)
def test_the_mesh_under_sanitizers(tmp_path: Path, sanitizers: str, what: list[str]) -> None:
    run_sanitized("mesh", MESH, sanitizers, what, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "what"),
    [
        ("address,undefined", ["calls 20000", "forks 100"]),
        ("thread", ["calls 10000"]),
    ],
)
def test_threads_under_sanitizers(tmp_path: Path, sanitizers: str, what: list[str]) -> None:
    """Many callers, parts that throw, workers that sleep, forks while others are at work."""
    run_sanitized("threads", [THREADS], sanitizers, what, tmp_path)
