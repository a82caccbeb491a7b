"""Embeddings split by rows: a token's row is held by one rank, and the others add zeros."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forward, call_with
from narrowcast.engines.transformers.sharding import chunks, is_packed
from narrowcast.runtime.wires import Wires
from narrowcast.weights.layers import PackedEmbedding, local


@dataclass(frozen=True)
class Lookup:
    """The product of token ids [T, 1] with an embedding: rows of the `own` ones, else zeros.

    `find`: rows by their place among these. `num_rows`: of the whole embedding. `dtype`: of the rows.
    """

    find: Callable[[Tensor], Tensor]
    own: slice
    num_rows: int
    num_features: int
    dtype: torch.dtype

    def __call__(self, ids_T1: Tensor, num_tokens: int) -> Tensor:
        ids = ids_T1[:, 0]
        if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < self.num_rows:
            raise IndexError(f"token ids from {ids.min()} to {ids.max()} for a vocabulary of {self.num_rows}")
        if self.own.start == self.own.stop:
            return torch.zeros(len(ids), self.num_features, dtype=self.dtype, device=ids.device)
        held = (ids >= self.own.start) & (ids < self.own.stop)
        return self.find((ids - self.own.start).masked_fill(~held, 0)).masked_fill(~held[:, None], 0)


def lookup(name: str, module: Any, wires: Wires) -> Forward:
    """The sum of what each rank finds of the tokens."""
    dtype = module.dtype if is_packed(module) else module.weight.dtype
    products = [
        Lookup(_finding(module, own, wires), own, module.num_embeddings, module.embedding_dim, dtype)
        for own in chunks(module.num_embeddings, wires)
    ]
    row_parallel = wires.row_parallel(name, products)
    return lambda ids: row_parallel(ids[..., None])


def _finding(module: Any, own: slice, wires: Wires) -> Callable[[Tensor], Tensor]:
    """Finds rows of those that are the rank's own."""
    if is_packed(module):
        first = own.start if wires.virtual else 0
        return lambda rows: cast(Tensor, module.look_up(rows + first))
    held = local(module.weight)

    def find(rows: Tensor) -> Tensor:
        weight = held[own] if wires.virtual else held
        return cast(Tensor, call_with(module, {"weight": weight, "padding_idx": None}, rows))

    return find


def is_lookup(module: nn.Module) -> bool:
    """True for a module that looks rows up; it may scale what it finds, as Gemma does."""
    return isinstance(module, nn.Embedding | PackedEmbedding)
