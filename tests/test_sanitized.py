"""The C++ mesh, and small sums over it, under the address, undefined-behaviour and thread sanitizers.

Needs a compiler that has them.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = [
    ROOT / "tests" / "sanitized_mesh.cpp",
    *(CSRC / "mesh").glob("*.cpp"),
    *(CSRC / "sums").glob("*.cpp"),
    CSRC / "kernels" / "threads.cpp",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "what"),
    [
        ("address,undefined", ["fuzz 5000", "sums 2000"]),
        ("thread", ["threads 150", "sums 500"]),
    ],
)
def test_the_mesh_under_sanitizers(tmp_path: Path, sanitizers: str, what: list[str]) -> None:
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
    built = subprocess.run([compiler, *flags, *SOURCES, "-o", tmp_path / "mesh"], capture_output=True, text=True)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("needs a compiler with sanitizers")
    assert built.returncode == 0, built.stderr
    for each in what:
        done = subprocess.run([tmp_path / "mesh", *each.split()], capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
