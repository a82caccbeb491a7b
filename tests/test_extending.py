"""The examples of docs/extending/ are run as they stand, each in processes of its own: what one adds stays there."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranks import Ranks

ROOT = Path(__file__).parents[1]
PAGES = {"codec": 1, "kernel": 1, "collective": 4, "engine": 2}  # ranks that each page is written for


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The page's Python: (file name, or "" for what is run, code). Lines keep their numbers, for tracebacks."""
    text = page.read_text(encoding="utf8")
    for found in re.finditer(r"^```python *(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1], "\n" * (text.count("\n", 0, found.start()) + 1) + found[2]


def run(page: Path, folder: Path) -> int:
    """Write the page's files, run the rest; how many assertions that was."""
    os.chdir(ROOT)
    # Ranks are forked with modules that are plugins of pytest, too, which a page may run.
    os.environ["PYTEST_ADDOPTS"] = "-W ignore::pytest.PytestAssertRewriteWarning"
    sys.path.insert(0, str(folder))
    names = {"__name__": "page"}
    num_asserts = 0
    for name, code in blocks(page):
        if name:
            (folder / name).write_text(code, encoding="utf8")
        else:
            exec(compile(code, str(page), "exec"), names)
            num_asserts += code.count("\nassert ") + code.count("    assert ")
    return num_asserts


@pytest.mark.parametrize("name", PAGES)
def test_the_example_does_what_its_page_says(tmp_path: Path, name: str) -> None:
    pool = Ranks(PAGES[name])
    folders = [tmp_path / str(rank) for rank in range(pool.world_size)]
    for folder in folders:
        folder.mkdir()
    try:
        for found in pool.run(run_on_rank, ROOT / "docs" / "extending" / f"{name}.md", folders):
            assert found >= 3
    finally:
        pool.close()


def run_on_rank(page: Path, folders: list[Path]) -> int:
    return run(page, folders[int(os.environ["RANK"])])


def test_every_page_is_run() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "extending").glob("*.md")} - {"README"}
    assert pages == PAGES.keys()
