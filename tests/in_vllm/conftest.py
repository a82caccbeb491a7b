"""Fixtures: where vLLM is, and plans that our Transformers engine made."""

import importlib.metadata
from pathlib import Path

import pytest

from running import ordinary


@pytest.fixture(scope="session")
def served_by_vllm() -> None:
    """Skips what needs vLLM where it is not."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs vLLM: make test-vllm")


@pytest.fixture(scope="session")
def folder(served_by_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where plans and models are, made by the ordinary environment."""
    made: Path = tmp_path_factory.mktemp("vllm")
    ordinary("calibrate", made)
    return made
