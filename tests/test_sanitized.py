"""The C++ mesh under the address, undefined-behaviour and thread sanitizers; needs a compiler that has them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "tests" / "sanitized_mesh.cpp", *(ROOT / "csrc" / "mesh").glob("*.cpp")]


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizers", "what"), [("address,undefined", "fuzz 5000"), ("thread", "threads 150")])
def test_the_mesh_under_sanitizers(tmp_path: Path, sanitizers: str, what: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-std=c++17", "-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    built = subprocess.run([compiler, *flags, *SOURCES, "-o", tmp_path / "mesh"], capture_output=True, text=True)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("needs a compiler with sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "mesh", *what.split()], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
