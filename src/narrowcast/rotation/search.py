"""Choosing axes for a model: the same for all, or measured on text."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from narrowcast.calibration import observe
from narrowcast.engines import engine_of
from narrowcast.rotation.axes import fisher_pooled, hadamard, joint, principal

Axes = Literal["hadamard", "principal", "fisher", "joint"]


def search(model: nn.Module, axes: Axes, batches: Sequence[Tensor] = (), *, tp_size: int = 2) -> Tensor:
    """The rotation [E, E] onto such axes, FP64: all but "hadamard" measured on token ids [B, T].

    Partial sums are measured as `tp_size` ranks of the whole `model` would have them. Raises InvalidInputError for what
    calibration refuses.
    """
    if axes == "hadamard":
        return hadamard(engine_of(model).num_features(model))
    seen = observe(model, batches, tp_size=tp_size, moments="full").moments
    covariances = {site: each.partial.sum(dim=0) + each.total[0] for site, each in seen.items()}
    if axes == "principal":
        return principal(covariances)
    fishers = {site: each.fisher for site, each in seen.items()}
    return {"fisher": fisher_pooled, "joint": joint}[axes](covariances, fishers)
