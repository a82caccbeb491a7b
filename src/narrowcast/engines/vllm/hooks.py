"""Methods that vLLM's workers are given. Where nothing is asked for, only the settings of narrowcast are loaded."""

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from narrowcast.engines.vllm.ending import end_with_the_others, exit_with_status
from narrowcast.engines.vllm.settings import LOGGER, Settings, misspelt
from narrowcast.engines.vllm.tools import Tools
from narrowcast.errors import NarrowcastError

logger = logging.getLogger(LOGGER)


def register(tools: Tools) -> None:
    """Have each worker do what the settings name, with these tools; without settings, nothing changes.

    Where the environment's are such that nothing could be started, `vllm serve` ends with a sentence, other commands
    of vLLM go on, and Python gets what `Settings.of` raises.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _check_environment()
    # Wrappers hand on to their workers whatever they do not define, of all kinds of executors and devices.
    WorkerWrapperBase.narrowcast_tools = tools
    for method in METHODS:
        setattr(WorkerWrapperBase, method.__name__, method)
    exit_with_status(tools.show)


def _check_environment() -> None:
    if multiprocessing.parent_process() is None:
        for variable, known in misspelt(os.environ):
            logger.warning("%s is nothing that narrowcast knows: is %s meant?", variable, known)
    try:
        Settings.of({})
    except NarrowcastError as error:
        program, *arguments = sys.argv
        command = Path(program).name
        if command == "api_server.py" or (command == "vllm" and arguments[:1] == ["serve"]):
            raise SystemExit(f"narrowcast: error: {error}") from None
        if command != "vllm":
            raise
        logger.warning("%s", error)


def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Load the worker's model, and have it send what the settings say, if there are any."""
    settings = Settings.of(self.vllm_config.additional_config)
    if settings is None:
        return self.worker.load_model(*args, **kwargs)
    if settings.plan is None and self.vllm_config.parallel_config.tensor_parallel_size == 1:
        logger.info("%s has nothing to do: there is one tensor-parallel rank", settings.name)
        return self.worker.load_model(*args, **kwargs)
    from narrowcast.engines.vllm import layers
    from narrowcast.engines.vllm.ranks import Ranks

    with _refusals_told():
        ranks = Ranks(settings, self.narrowcast_tools, self.vllm_config, self.worker.device)
        layers.register()
        loaded = self.worker.load_model(*args, **kwargs)
        self.narrowcast_wires = ranks.take_over(self.worker.get_model())
    end_with_the_others(self.worker)
    self.narrowcast_ranks = ranks
    return loaded


def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Warm the model up, after which ranks wait less long for each other, and tell their figures."""
    warmed = self.worker.compile_or_warm_up_model(*args, **kwargs)
    if "narrowcast_ranks" in vars(self):
        with _refusals_told():
            self.narrowcast_ranks.started(self.narrowcast_wires.sites, self.worker.rank)
    return warmed


def narrowcast_report(self: Any) -> dict[str, Any]:
    """The figures of what this rank has sent, as JSON values; {} where nothing was taken over."""
    wires = vars(self).get("narrowcast_wires")
    return {} if wires is None else wires.sites.report().to_json()


@contextmanager
def _refusals_told() -> Iterator[None]:
    """Tell a refusal in a line of its own, above the traceback with which vLLM ends a worker."""
    try:
        yield
    except NarrowcastError as error:
        logger.error("%s", error)
        raise


METHODS = load_model, compile_or_warm_up_model, narrowcast_report
