"""Running a model over text while its values travel over wires that look at them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from narrowcast.calibration.gathering import GatheringCommunicator
from narrowcast.engines import device_of, engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.plan.split import Split
from narrowcast.runtime.wires import Wires
from narrowcast.transport import transports_of


@contextmanager
def travelling_over(wires: Wires, model: nn.Module, split: Split) -> Iterator[None]:
    """Let the values of all ranks travel over `wires`: of a whole model, or gathered from those of a split one."""
    engine = engine_of(model)
    if engine.split_of(model) == Split():
        forwards = engine.split_virtually(model, split, wires)
    else:
        transports = transports_of(engine.groups(model))
        forwards = engine.take_over(model, GatheringCommunicator(wires, *transports, device=device_of(model)))
    try:
        with evaluating(model):
            yield
    finally:
        forwards.restore()


def run(model: nn.Module, ids: Tensor) -> None:
    """One sequence [T] through the model."""
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
