"""Running a function on `world_size` ranks: started here, or, under torchrun, those that it started."""

import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.launch.process import as_rank

SHUTDOWN_S = 3

P = ParamSpec("P")
T = TypeVar("T")


def on_ranks(function: Callable[P, T], world_size: int, timeout_s: float, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns on rank 0. Its arguments must be picklable; ranks join within `timeout_s`."""
    if under_torchrun():
        _check_world_size(world_size)
        return cast(T, _rank_main(function, timeout_s, args, kwargs))
    _silence_launcher()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as logs:
        return _launched(function, world_size, timeout_s, logs, args, kwargs)


def _launched(
    function: Callable[P, T],
    world_size: int,
    timeout_s: float,
    logs: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    try:
        results: dict[int, T] = elastic_launch(config, _rank_main)(function, timeout_s, args, kwargs)
    except SignalException as interruption:  # Ctrl-C: the ranks have been ended
        raise KeyboardInterrupt from interruption
    except ChildFailedError as error:
        raise NarrowcastError(_cause(error)) from error
    return results[0]


def _silence_launcher() -> None:
    """What torch's launcher would log about a failure or Ctrl-C is told once, by us."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def under_torchrun() -> bool:
    """Whether torchrun, or something like it, started this process as a rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_first_rank() -> bool:
    """Whether this process prints: the one that started the ranks, or rank 0 under torchrun."""
    return not under_torchrun() or int(os.environ["RANK"]) == 0


@record
def _rank_main(function: Callable[..., Any], timeout_s: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return as_rank(function, timeout_s, *args, **kwargs)


def _check_world_size(world_size: int) -> None:
    found = int(os.environ["WORLD_SIZE"])
    if found != world_size:
        raise InvalidInputError(
            "torchrun", expected=f"{world_size} ranks, as the plan has", found=found, remedy="Start that many."
        )


def _cause(error: ChildFailedError) -> str:
    """Who failed, and why: a rank that a signal killed comes before those that missed it."""
    killed = [rank for rank, failure in error.failures.items() if failure.exitcode not in (1, -signal.SIGTERM)]
    rank, failure = (killed[0], error.failures[killed[0]]) if killed else error.get_first_failure()
    message = cast(Any, failure.message)
    if isinstance(message, dict):
        message = message["message"]
    return f"rank {rank}: {message}"
