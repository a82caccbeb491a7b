"""Layers of Transformers' caches that take new tokens in place, where they would copy all keys and values for each.

Its tensors become views of larger ones, into whose free places new tokens go. Only the layer that holds the very
tensors that were given out last may write behind them: one that was cropped, reordered or branched off gets room of its
own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from narrowcast.weights.arena import PAGE, in_large_pages

_ROOM = "narrowcast_room"
_LEAST_ROOM, _PART = 128, 8  # free places of new room: so many, or an eighth of those that are taken

Pair = tuple[Tensor, Tensor]


def length(layer: Any, num_tokens: int) -> int | None:
    """The number of keys [B, G, C, D] that `grow` will put new tokens behind; None where it cannot."""
    kinds = _kinds()
    if type(layer) not in kinds or not layer.is_initialized or getattr(layer, "record_past", False):
        return None
    if (written := getattr(layer, "cumulative_length", None)) is not None and isinstance(written, Tensor):
        num_keys = int(written)
        return num_keys if num_keys + num_tokens <= layer.keys.shape[2] else None
    return int(layer.keys.shape[2])


def grow(layer: Any, num_tokens: int) -> Pair:
    """Keys and values with places for `num_tokens` new ones at the end, which the layer counts as its own from now on.

    A layer with a sliding window keeps what later tokens will see; all that the new ones see is returned.
    """
    return _kinds()[type(layer)](layer, num_tokens)


@functools.cache
def _kinds() -> dict[type, Callable[[Any, int], Pair]]:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

    return {DynamicLayer: _grow, DynamicSlidingWindowLayer: _slide, StaticLayer: _fill}


def _grow(layer: Any, num_tokens: int) -> Pair:
    layer.keys, layer.values = pair = _room(layer, num_tokens).take(num_tokens)
    return pair


def _slide(layer: Any, num_tokens: int) -> Pair:
    room = _room(layer, num_tokens)
    whole = room.take(num_tokens)
    layer.keys, layer.values = room.drop(whole[0].shape[2] - layer.sliding_window + 1)
    layer.cumulative_length += num_tokens
    return whole


def _fill(layer: Any, num_tokens: int) -> Pair:
    stop = int(layer.cumulative_length) + num_tokens
    layer.cumulative_length.add_(num_tokens)
    return layer.keys[:, :, :stop], layer.values[:, :, :stop]


class Room:
    """Keys and values, places start to stop of larger tensors. `given`: the views of them that the layer has."""

    def __init__(self, keys: Tensor, values: Tensor, num_tokens: int) -> None:
        self.start, self.stop = 0, keys.shape[2]
        free = num_tokens + max(_LEAST_ROOM, self.stop // _PART)
        self._buffers = _enlarged((keys, values), free)
        self.given: Pair = (keys, values)

    def is_of(self, layer: Any, num_tokens: int) -> bool:
        """True if nobody else can have written behind the layer's tensors, and new tokens find place there."""
        mine = layer.keys is self.given[0] and layer.values is self.given[1]
        return mine and self.stop + num_tokens <= self._buffers[0].shape[2]

    def take(self, num_tokens: int) -> Pair:
        """The views, with so many new places."""
        self.stop += num_tokens
        return self._give()

    def drop(self, num_tokens: int) -> Pair:
        """The views without their first tokens, if the number is positive."""
        self.start += max(num_tokens, 0)
        return self._give()

    def _give(self) -> Pair:
        keys, values = (buffer[:, :, self.start : self.stop] for buffer in self._buffers)
        self.given = keys, values
        return keys, values


def _room(layer: Any, num_tokens: int) -> Room:
    room: Room | None = vars(layer).get(_ROOM)
    if room is None or not room.is_of(layer, num_tokens):
        room = vars(layer)[_ROOM] = Room(layer.keys, layer.values, num_tokens)
    return room


def _enlarged(pair: Pair, free: int) -> Pair:
    """Copies of keys and values with so many free places, in large pages where they fill some."""
    shapes = [(*x.shape[:2], x.shape[2] + free, x.shape[3]) for x in pair]
    sizes = [math.prod(shape) * x.element_size() for shape, x in zip(shapes, pair, strict=True)]
    room = (in_large_pages if sum(sizes) > 2 * PAGE else _bytes)(sum(sizes))
    keys, values = (
        part.view(x.dtype).view(shape) for part, x, shape in zip(room.split(sizes), pair, shapes, strict=True)
    )
    for larger, x in zip((keys, values), pair, strict=True):
        larger[:, :, : x.shape[2]] = x
    return keys, values


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
