"""Rotating a model in memory: other axes for its residual stream, the same answers."""

import torch
from torch import Tensor, nn

from narrowcast.attaching import check_detached, check_loaded
from narrowcast.engines import engine_of
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Split

ORTHOGONAL_WITHIN = 1e-5  # of FP32 matrices


def rotate(model: nn.Module, rotation_EE: Tensor) -> None:
    """Fold the orthogonal `rotation_EE` [E, E] into all weights of a whole `model`, in place.

    Its columns are the new axes of the residual stream, and so of every partial sum that is added to it. Rotated
    weights are computed in FP32 or FP64 and rounded once to their own dtype. Plans for the model as it was are not for
    the rotated one. Raises InvalidInputError, with the model as it was, for one whose answers would change: with norms
    after its sub-layers, with LayerNorm, quantized, split, or with a plan attached.
    """
    engine = engine_of(model)
    check_detached(model)
    check_loaded(model)
    if (found := engine.split_of(model)) != Split():
        raise InvalidInputError(
            type(model).__name__, expected="a whole model", found=f"one split by {found}", remedy="Rotate, then split."
        )
    _check_orthogonal(rotation_EE)
    engine.rotate(model, rotation_EE)


def _check_orthogonal(rotation_EE: Tensor) -> None:
    if rotation_EE.ndim == 2:
        matrix = rotation_EE.double()
        error = (matrix.T @ matrix - torch.eye(matrix.shape[1], device=matrix.device)).abs().max().item()
        if rotation_EE.shape[0] == rotation_EE.shape[1] and error <= ORTHOGONAL_WITHIN:
            return
    raise InvalidInputError(
        "rotation",
        expected=f"an orthogonal matrix [E, E], within {ORTHOGONAL_WITHIN:g}",
        found=f"{list(rotation_EE.shape)}" + (f", off by {error:.1g}" if rotation_EE.ndim == 2 else ""),
        remedy="Take one of narrowcast.rotation.axes, or the Q of torch.linalg.qr.",
    )
