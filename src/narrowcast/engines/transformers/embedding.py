"""Embeddings split by rows: a token's row is held by one rank, and the others add zeros."""

from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forward, call_with, chunk
from narrowcast.engines.transformers.weights import local
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.wires import Wires


def virtual_embedding(name: str, module: Any, tp_size: int, wires: Wires) -> Forward:
    """What each rank finds of the tokens, and their sum."""
    chunks = [chunk(module.weight.shape[0], rank, tp_size) for rank in range(tp_size)]

    def forward(ids: Tensor) -> Tensor:
        partials = [_rows(module, module.weight[own], own, ids) for own in chunks]
        return wires.all_reduce(partials, name)

    return forward


def real_embedding(name: str, module: Any, communicator: Communicator) -> Forward:
    """What this rank finds of the tokens, added to what the others find."""
    num_rows = module.weight.shape[0]
    own = chunk(num_rows, communicator.tp.rank, communicator.tp.world_size)
    weight = local(module.weight)

    def forward(ids: Tensor) -> Tensor:
        if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < num_rows:
            raise IndexError(f"token ids from {ids.min()} to {ids.max()} for a vocabulary of {num_rows}")
        return communicator.all_reduce(_rows(module, weight, own, ids), name)

    return forward


def is_lookup(module: nn.Module) -> bool:
    """Whether the module looks rows up; it may scale what it finds, as Gemma does."""
    return isinstance(module, nn.Embedding)


def _rows(module: Any, weight: Tensor, own: slice, ids: Tensor) -> Tensor:
    """The module's output where `weight` holds the token's row, zeros elsewhere."""
    if not len(weight):
        return torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    held = (ids >= own.start) & (ids < own.stop)
    rows = (ids - own.start).masked_fill(~held, 0)
    found: Tensor = call_with(module, {"weight": weight, "padding_idx": None}, rows)
    return found.masked_fill(~held[..., None], 0)
