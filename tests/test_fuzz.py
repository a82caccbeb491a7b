"""Random bytes through every C++ kernel, built with sanitizers (csrc/kernels/fuzz.cpp, csrc/weights/fuzz.cpp)."""

import shutil
import subprocess
from pathlib import Path

import pytest

from narrowcast.codecs import kernels

ROOT = Path(__file__).parents[1]
tools = ["cmake", "c++"]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the sources are not here")
@pytest.mark.skipif(not all(map(shutil.which, tools)), reason=f"needs {' and '.join(tools)}")
def test_no_bytes_make_a_kernel_read_or_write_beyond_its_buffers(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}", encoding="utf8")
    sanitizers = "-fsanitize=address,undefined"
    if subprocess.run(["c++", sanitizers, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    paths = [path for path in kernels.available() if path != kernels.REFERENCE] or ["portable"]
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", "-DNARROWCAST_FUZZ=ON", f"-DNARROWCAST_PATHS={';'.join(paths)}")
    run("cmake", "--build", tmp_path / "build", "--parallel", "2")
    told = run(tmp_path / "build" / "fuzz", "1000", "0")
    assert told.splitlines() == [f"{tested}: 1000 cases" for tested in [*paths, "products"]]
