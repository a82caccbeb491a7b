"""What is written: whole files where a path leads, nothing of a user's replaced, refusals before the work."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from narrowcast import InvalidInputError
from narrowcast.engines import model_folder
from narrowcast.engines.base import Engine
from narrowcast.files import check_report, check_writable, write_new, write_report

DATA = bytes(range(256)) * 400


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    kept, link, ahead = tmp_path / "real" / "kept", tmp_path / "link", tmp_path / "ahead"
    kept.write_text("old")
    link.symlink_to("real/kept")
    ahead.symlink_to("real/new")
    with pytest.raises(InvalidInputError, match="a file that exists"):
        write_new(link, DATA, overwrite=False)
    write_new(link, DATA, overwrite=True)
    write_new(ahead, DATA, overwrite=False)
    assert link.is_symlink() and ahead.is_symlink()
    assert kept.read_bytes() == (tmp_path / "real" / "new").read_bytes() == DATA
    assert names(tmp_path / "real") == ["kept", "new"]
    astray = tmp_path / "astray"
    astray.symlink_to("nowhere/new")
    with pytest.raises(InvalidInputError, match=r"found no .*nowhere\. Create it"):
        check_writable(astray, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path, overwrite: bool) -> None:
    pipe, read = tmp_path / "pipe", bytearray()
    os.mkfifo(pipe)
    with pytest.raises(InvalidInputError, match="no such device"):  # nobody reads
        write_new(pipe, DATA, overwrite=overwrite)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)

    def drain() -> None:
        while piece := os.read(reader, 1 << 16):
            read.extend(piece)

    writer = threading.Thread(target=write_new, args=(pipe, DATA), kwargs={"overwrite": overwrite})
    writer.start()
    while not read:  # until somebody writes there is nothing to read
        drain()
    writer.join()
    drain()
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and bytes(read) == DATA
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize(
    "write", [lambda path: write_report(path, {"a": 1}), lambda path: write_new(path, b"{}", overwrite=True)]
)
def test_a_device_is_written_to_and_stays_one(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A terminal, by a link to it: what a wrong way would replace is the link."""
    master, terminal = os.openpty()
    device = tmp_path / "terminal"
    device.symlink_to(os.ttyname(terminal))
    check_report(device)
    write(device)
    assert b"{" in os.read(master, 1 << 16)
    assert stat.S_ISCHR(device.stat().st_mode)
    os.close(master)
    os.close(terminal)


def test_an_empty_file_is_none_and_keeps_its_mode(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.touch(0o600)
    full.write_text(" ")
    check_report(empty)
    write_new(empty, DATA, overwrite=False)
    assert empty.read_bytes() == DATA and stat.S_IMODE(empty.stat().st_mode) == 0o600
    with pytest.raises(InvalidInputError, match="found another file"):
        check_report(full)
    full.chmod(0o640)
    write_new(full, DATA, overwrite=True)
    assert stat.S_IMODE(full.stat().st_mode) == 0o640


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("ñ" * 127)
    write_new(path, DATA, overwrite=False)
    assert path.read_bytes() == DATA and names(tmp_path) == [path.name]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from narrowcast import InvalidInputError
from narrowcast.engines import model_folder
from narrowcast.engines.base import Engine
from narrowcast.files import check_writable, write_new
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
path = Path(sys.argv[1])
try:
    check_writable(path, overwrite=True)
    print("begun")
    write_new(path, bytes(100_000), overwrite=True)
except InvalidInputError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "begun"), [(1000, False), (50_000, True)])
def test_a_full_disk_is_found_out_before_the_work_and_never_costs_a_file(
    tmp_path: Path, limit: int, begun: bool
) -> None:
    """A limit on the sizes of files stands in for the disk."""
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, path, str(limit)], capture_output=True, text=True, timeout=60)
    told = f"{path}: expected a place that can be written, found file too large."
    assert done.stdout.startswith("begun\n" + told if begun else told), done.stdout + done.stderr
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work() -> None:
    with pytest.raises(InvalidInputError, match="expected a place that can be written"):
        check_writable(Path("/proc/self/plan"), overwrite=False)


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming the new one into its place fails."""
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    (out / "kept").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(InvalidInputError, match="a place that can be written, found no"),
        model_folder.written(cast(Engine, None), str(source), out, "rotate", {}) as folder,
    ):
        assert folder.is_dir()
    assert (out / "kept").read_text() == "old" and names(tmp_path) == ["out", "source"]


def test_a_report_of_another_command_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "base.json"
    monkeypatch.setattr("sys.argv", ["narrowcast", "evaluate", "model", "--json", str(path)])
    write_report(path, {"kl_nats": 0.1})
    check_report(path)
    monkeypatch.setattr("sys.argv", ["narrowcast", "generate", "model"])
    with pytest.raises(InvalidInputError, match="a new file or an earlier report, found a report of evaluate"):
        check_report(path)
