"""The plug-in that vLLM loads in each of its processes (docs/vllm.md): the engine, and what else can be done there.

What is not asked for is not imported either.
"""

from collections.abc import Callable

import torch

from narrowcast.codecs import Recipe
from narrowcast.engines import vllm
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.runtime.communicator import Communicator
from narrowcast.transport import Transport


def register() -> None:
    """Have each worker do what the environment or vLLM's `additional_config` names; without either, nothing changes.

    Called again it does nothing more. What cannot be done at all is refused here, before anything is started:
    PlanFormatError or InvalidInputError.
    """
    vllm.register(vllm.Tools(tune=_tune, recipe=_recipe, calibrate=_calibrate))


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
