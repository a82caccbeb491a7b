"""Batches of text as single sequences without padding, so that neither batch size nor padding changes a plan."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError

Batch = Tensor | Mapping[str, Tensor]


def sequences(batches: Iterable[Batch], device: torch.device) -> Iterator[Tensor]:
    """Token ids [T] of each sequence, without padding."""
    for batch in batches:
        ids, mask = _ids_and_mask(batch)
        for row, kept in itertools.zip_longest(ids, mask):
            sequence = row[kept.bool()]
            if len(sequence):
                yield sequence.to(device)


def _ids_and_mask(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Tensor | Mapping):
        raise _not_a_batch(repr(batch)[:60])
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor | None):
        raise _not_a_batch(f"{type(ids).__name__} and {type(mask).__name__}")
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise _not_a_batch(f"{list(ids.shape)}" + ("" if mask is None else f" and {list(mask.shape)}"))
    return ids, torch.ones_like(ids) if mask is None else mask


def _not_a_batch(found: str) -> InvalidInputError:
    return InvalidInputError(
        "calibration batches",
        expected="an iterable of tensors input_ids [B, T], or of mappings with them and attention_mask of that shape",
        found=found,
        remedy="Pass a list of what a tokenizer returns with return_tensors='pt'.",
    )
