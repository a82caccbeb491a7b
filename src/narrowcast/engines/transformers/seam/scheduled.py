"""Decoder layers that are recorded in a decoding step on ranks, and run as recorded from then on (decision 38)."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook

from narrowcast.engines.forwards import Forwards
from narrowcast.engines.transformers.decoding import growing
from narrowcast.engines.transformers.decoding.families import is_known_layer
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.scheduled import Scheduled, recording
from narrowcast.runtime.schedules import NotRecordableError

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # at recording a kind of call: the first sums take steps, and caches are moved to where they can grow
MAX_KINDS = 16  # of calls of a layer: each keeps its results in between
# What a layer may be given besides hidden states. Others say nothing, or it is not recorded.
KNOWN = {"attention_mask", "past_key_values", "position_embeddings", "position_ids", "use_cache"}

Key = tuple[object, ...]


def schedule_steps(model: nn.Module, wires: Communicator, forwards: Forwards) -> None:
    """Let the decoder layers of `model` whose classes are known run as recorded where they can."""
    for name, layer in model.named_modules():
        if is_known_layer(layer):
            forwards.set(layer, "forward", _recorded(name, layer, wires))


def _recorded(name: str, layer: nn.Module, wires: Communicator) -> Callable[..., Any]:
    whole, recorded = layer.forward, RecordedLayer(name, layer, wires)

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(args) != 1:
            return whole(*args, **kwargs)
        return recorded(whole, args[0], kwargs)

    return forward


class RecordedLayer:
    """The schedules of one layer, by kind of call. All are forgotten where its modules or weights are others."""

    def __init__(self, name: str, layer: Any, wires: Communicator) -> None:
        self._layer, self._wires, self._index = layer, wires, layer.self_attn.layer_idx
        self._first_sum = f"{name}.self_attn.o_proj"
        inside = [each for each in layer.modules() if each is not layer]
        self._hooks = [hooks for each in inside for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._attributes = [vars(each) for each in inside]
        self._children = [each._modules for each in (layer, *inside) if each._modules]
        self._weights = [each._parameters for each in inside if _has_plain_weights(each)]
        self._state = self._now()
        self._schedules: dict[Key, Scheduled] = {}
        self._attempts: dict[Key, int] = {}

    def __call__(self, whole: Callable[..., Any], x: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """The layer's hidden states [B, 1, E]: as recorded, or by `whole`, which is recorded where it can be."""
        key = self._key(x, kwargs)
        if key is None:
            return whole(x, **kwargs)
        schedule = self._schedules.get(key)
        if schedule is None:
            return self._record(key, whole, x, kwargs)
        keys, values = growing.grow(kwargs["past_key_values"].layers[self._index], 1)
        try:
            return schedule.run(x, keys, values, kwargs.get("attention_mask"), kwargs["position_embeddings"])
        except BaseException:
            self._forget()
            raise

    def _key(self, x: Tensor, kwargs: Mapping[str, Any]) -> Key | None:
        """All that decides how the layer runs; None for a call that is not to be recorded."""
        cache, turns = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if (
            type(x) is not Tensor
            or x.dim() != 3
            or x.shape[1] != 1
            or not x.is_contiguous()
            or cache is None
            or type(turns) is not tuple
            or self._layer.training
            or any(self._hooks)
            or _has_any_global_hook()
            or not KNOWN.issuperset(kwargs)
            or not self._wires.may_schedule(x)
        ):
            return None
        layer: Any = None if self._index >= len(cache.layers) or cache.offloading else cache.layers[self._index]
        goes_on = self._wires.feedback.goes_on(self._first_sum, x.shape[0], x.shape[2])
        num_keys, mask = growing.length(layer, 1), kwargs.get("attention_mask")
        if goes_on is None or num_keys is None or not (mask is None or _says_what_is_seen(mask, len(x), num_keys + 1)):
            return None
        if self._now() != self._state:
            self._forget()
        of_cache, of_turns = _heads(layer.keys) + _heads(layer.values), _kind(turns[0]) + _kind(turns[1])
        return x.shape, x.dtype, mask is None, goes_on, of_cache, of_turns, torch.get_num_threads()

    def _now(self) -> list[Any]:
        """All that the schedules stand on: forwards, modules and weights inside."""
        state = [each.get("forward") for each in self._attributes]
        state += [child for children in self._children for child in children.values()]
        return state + [w.data_ptr() for weights in self._weights for w in weights.values() if w is not None]

    def _forget(self) -> None:
        self._state = self._now()
        self._schedules.clear()
        self._attempts.clear()

    def _record(self, key: Key, whole: Callable[..., Any], x: Tensor, kwargs: Mapping[str, Any]) -> Any:
        attempts = self._attempts.get(key, 0)
        if attempts == ATTEMPTS or (not attempts and len(self._attempts) == MAX_KINDS):
            return whole(x, **kwargs)
        self._attempts[key] = attempts + 1
        with recording(self._wires) as recorder:
            out = whole(x, **kwargs)
        try:
            self._schedules[key] = Scheduled(self._wires, recorder, x, out, kwargs["position_embeddings"])
        except NotRecordableError as reason:
            logger.debug("%s is not recorded: %s", self._first_sum, reason)
        return out


def _has_plain_weights(module: nn.Module) -> bool:
    """True for one that has weights itself, which it may be given others for: no part of what ranks share."""
    own = [weight for weight in module._parameters.values() if weight is not None]
    return bool(own) and not any(isinstance(weight, DTensor) for weight in own)


def _heads(x_BGCD: Tensor) -> Key:
    num_sequences, num_heads, _, size = x_BGCD.shape
    return x_BGCD.dtype, num_sequences, num_heads, size, x_BGCD.stride(3)


def _kind(x: Tensor) -> Key:
    return type(x), x.dtype, x.shape, x.is_contiguous()


def _says_what_is_seen(mask: Any, num_sequences: int, num_keys: int) -> bool:
    """True for a mask of one new token a sequence, the same for all heads."""
    if type(mask) is not Tensor or mask.dtype is not torch.bool or mask.dim() != 4:
        return False
    return len(mask) in (1, num_sequences) and mask.shape[1:3] == (1, 1) and mask.shape[3] >= num_keys
