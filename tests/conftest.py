"""Fixtures: rank processes, small models, the bundled model's text."""

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

from narrowcast.errors import InvalidInputError
from narrowcast.launch import emulation
from ranks import Ranks

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"
SHARED = Path(__file__).parents[2] / "shared"

# make test-vllm runs these, in an environment of its own; two files called conftest would stand for each other here.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["in_vllm"]

# Files by group that start processes of their own, or compilers, besides the pools of the fixture `ranks`.
STARTING = {
    "processes": {"bench", "cli", "failure", "handshake", "launch", "tcp", "tutorial", "wire_bytes"},
    "servers": {"preflight", "scorecard", "scraped", "served_metrics", "serving"},
    "ranks": {"fuzz", "sanitized"},
}

torch.set_num_threads(1)  # as the ranks compute, and so that results do not depend on the machine's cores


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays together, and so do files that start processes, which mostly wait, and those of one pool of ranks.

    Workers begin with the groups of the most tests, so that none is alone with a long one at the end.
    """
    for item in items:
        file = item.path.stem.removeprefix("test_")
        started = next((group for group, files in STARTING.items() if file in files), None)
        group = started or ("ranks" if "ranks" in getattr(item, "fixturenames", ()) else file)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """What was imported stays: whoever collects garbage, as continuous batches do, need not look at all of it."""
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(4).run(function, ...)` runs a function on four processes that live until the session ends."""
    pools: dict[int, Ranks] = {}

    def of(world_size: int) -> Ranks:
        if world_size not in pools or not pools[world_size].alive:
            pools[world_size] = Ranks(world_size)
        return pools[world_size]

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture
def emulator() -> None:
    """Skips the test where links cannot be emulated."""
    try:
        emulation.check_possible(2)
    except InvalidInputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of texts and models that the repository does not carry."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder beside the repository")
    return SHARED
