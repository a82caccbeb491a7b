"""The plug-in that vLLM loads in each of its processes (docs/vllm.md): the engine, and what else can be done there.

What is not asked for is not imported either.
"""

import atexit
import multiprocessing
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from narrowcast.codecs import Recipe
from narrowcast.engines import vllm
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.runtime.communicator import Communicator
from narrowcast.transport import Transport

FOLDER = "NARROWCAST_METRICS_FOLDER"  # which a process of vLLM's hands on to those that it starts


def register() -> None:
    """Have each worker do what the environment or vLLM's `additional_config` names; without either, nothing changes.

    Called again it does nothing more. What cannot be done at all is refused here, before anything is started:
    PlanFormatError or InvalidInputError.
    """
    folder = _folder()
    vllm.register(
        vllm.Tools(
            tune=_tune,
            recipe=_recipe,
            calibrate=_calibrate,
            publish=partial(_publish, folder),
            show=partial(_show, folder),
        )
    )


def _folder() -> Path:
    """Where the ranks of this vLLM leave their figures, if they do: named, and removed, by its first process."""
    if FOLDER not in os.environ or multiprocessing.parent_process() is None:
        path = Path(tempfile.gettempdir(), f"narrowcast-metrics-{secrets.token_hex(8)}")
        os.environ[FOLDER] = str(path)
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(os.environ[FOLDER])


def _publish(folder: Path, figures: vllm.Figures) -> None:
    from narrowcast.monitoring import Snapshot, processes
    from narrowcast.monitoring.metrics import collector_of

    def snapshot() -> Snapshot:
        about = {"rank": figures.rank, "num_ranks": figures.num_ranks}
        return Snapshot.of(figures.report(), figures.plan, transport=figures.transport, **about)

    if figures.port is not None:
        processes.listen(figures.port, collector_of(lambda: [snapshot()]))
    processes.leave_in(folder, snapshot)


def _show(folder: Path) -> None:
    from narrowcast.monitoring import processes
    from narrowcast.monitoring.metrics import collector_of

    processes.show(collector_of(lambda: processes.left_in(folder)))


def _tune(plan: Plan, ranks: Transport, dtype: torch.dtype) -> Decisions:
    from narrowcast.perf.tune import tune

    return tune(plan, ranks, dtype=dtype).decisions


def _recipe(codec: str) -> Recipe:
    from narrowcast.calibration.live import live_recipe

    return live_recipe(codec)


def _calibrate(
    recipe: Recipe, num_tokens: int, watched: vllm.Watched, on_plan: Callable[[Plan | InvalidInputError], None]
) -> tuple[Communicator, Callable[[], None]]:
    from narrowcast.calibration.live import LiveCommunicator

    wires = LiveCommunicator(
        watched.sites,
        recipe,
        num_tokens,
        tp=watched.ranks,
        device=watched.device,
        split=watched.split,
        model=watched.model,
        on_plan=on_plan,
    )
    return wires, wires.begin
