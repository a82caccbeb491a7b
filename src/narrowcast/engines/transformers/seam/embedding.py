"""Embeddings split by rows: a token's row is held by one rank, and the others add zeros."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forward, call_with
from narrowcast.engines.transformers.sharding import chunks, local
from narrowcast.runtime.wires import Wires


@dataclass(frozen=True)
class Lookup:
    """The product of token ids [T, 1] with an embedding: rows of the `own` ones, which `weight()` holds, else zeros."""

    module: Any
    weight: Callable[[], Tensor]
    own: slice

    @property
    def num_features(self) -> int:
        """The width of the embedding."""
        return int(self.module.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows."""
        dtype: torch.dtype = self.module.weight.dtype
        return dtype

    def __call__(self, ids_T1: Tensor) -> Tensor:
        ids, weight, num_rows = ids_T1[:, 0], self.weight(), self.module.weight.shape[0]
        if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < num_rows:
            raise IndexError(f"token ids from {ids.min()} to {ids.max()} for a vocabulary of {num_rows}")
        if not len(weight):
            return torch.zeros(len(ids), weight.shape[1], dtype=weight.dtype, device=weight.device)
        held = (ids >= self.own.start) & (ids < self.own.stop)
        rows = (ids - self.own.start).masked_fill(~held, 0)
        found: Tensor = call_with(self.module, {"weight": weight, "padding_idx": None}, rows)
        return found.masked_fill(~held[:, None], 0)


def lookup(name: str, module: Any, wires: Wires) -> Forward:
    """The sum of what each rank finds of the tokens."""
    products = [Lookup(module, _rows_of(module, own, wires), own) for own in chunks(module.weight.shape[0], wires)]
    row_parallel = wires.row_parallel(name, products)
    return lambda ids: row_parallel(ids[..., None])


def _rows_of(module: Any, own: slice, wires: Wires) -> Callable[[], Tensor]:
    if wires.virtual:
        return lambda: module.weight[own]
    weight = local(module.weight)
    return lambda: weight


def is_lookup(module: nn.Module) -> bool:
    """True for a module that looks rows up; it may scale what it finds, as Gemma does."""
    return isinstance(module, nn.Embedding)
