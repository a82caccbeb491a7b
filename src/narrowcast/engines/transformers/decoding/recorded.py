"""Decoder layers that are recorded in a decoding step, and run as recorded from then on (decision 38)."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook

from narrowcast.codecs import kernels
from narrowcast.codecs.kernels import cpu
from narrowcast.collectives.one_call import MAX_NBYTES
from narrowcast.engines.transformers.decoding import growing
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.scheduled import Scheduled, recording
from narrowcast.runtime.schedules import NotRecordableError

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # at recording a kind of call: the first sums take steps, and caches are moved to where they can grow
MAX_KINDS = 16  # of calls of a layer: each keeps its results in between
# What a layer may be given besides hidden states. Others say nothing, or it is not recorded.
KNOWN = {"attention_mask", "past_key_values", "position_embeddings", "position_ids", "use_cache"}
HOMES = {"torch", "transformers", "narrowcast"}  # whose modules do the same for each token while nothing changes
RECORDED = "narrowcast_recorded"

Key = tuple[object, ...]


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward: as it was recorded, where it can be."""
    if args or cpu.native is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, *args, **kwargs)
    recorded = vars(self).get(RECORDED)
    if recorded is None:
        recorded = vars(self)[RECORDED] = RecordedLayer(self)
    return recorded(self, hidden_states, kwargs)


def is_recorded(layer: nn.Module) -> bool:
    """True for one whose forward is `layer_forward`."""
    return getattr(vars(layer).get("forward"), "function", None) is layer_forward


class RecordedLayer:
    """The schedules of one layer, by kind of call; on ranks it is `name`d, as its sums over `wires` are.

    All are forgotten where modules or weights inside are others; copies of the layer have none.
    """

    def __init__(self, layer: Any, name: str = "", wires: Communicator | None = None) -> None:
        self._wires, self._index, self._config = wires, layer.self_attn.layer_idx, layer.self_attn.config
        self._first_sum = f"{name}.self_attn.o_proj"
        inside = [each for each in layer.modules() if each is not layer]  # the layer itself is not kept
        self._whole: Callable[..., Any] = type(layer).forward
        self._hooks = [hooks for each in inside for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._attributes = [vars(each) for each in inside]
        self._children = [each._modules for each in (layer, *inside) if each._modules]
        self._weights = [each._parameters for each in inside if _has_plain_weights(each)]
        self._given = [] if wires is None else self._forwards()  # by the engine and for `wires`
        self._schedules: dict[Key, Scheduled] = {}
        self._attempts: dict[Key, int] = {}
        self._forget()

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(self, layer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """The layer's hidden states [B, 1, E]: as recorded, or by its modules, which are recorded where they can be."""
        key = None if layer.training else self._key(x, kwargs)
        if key is None:
            return self._whole(layer, x, **kwargs)
        schedule = self._schedules.get(key)
        if schedule is None:
            return self._record(key, layer, x, kwargs)
        if schedule.due or not schedule.lock.acquire(blocking=False):  # another thread is in it
            return self._whole(layer, x, **kwargs)
        try:
            keys, values = growing.grow(kwargs["past_key_values"].layers[self._index], 1)
            return schedule.run(x, keys, values, kwargs.get("attention_mask"), kwargs["position_embeddings"])
        except BaseException:
            self._forget()
            raise
        finally:
            schedule.lock.release()

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
            or any(self._hooks)
            or _has_any_global_hook()
            or not KNOWN.issuperset(kwargs)
            or not self._may_schedule(x)
        ):
            return None
        layer: Any = None if self._index >= len(cache.layers) or cache.offloading else cache.layers[self._index]
        goes_on = self._goes_on(x)
        num_keys, mask = growing.length(layer, 1), kwargs.get("attention_mask")
        if goes_on is None or num_keys is None or not (mask is None or _says_what_is_seen(mask, len(x), num_keys + 1)):
            return None
        if self._now() != self._state:
            self._forget()
        if not self._is_known:
            return None
        of_cache, of_turns = _heads(layer.keys) + _heads(layer.values), _kind(turns[0]) + _kind(turns[1])
        return x.shape, x.dtype, mask is None, goes_on, of_cache, of_turns, torch.get_num_threads()

    def _may_schedule(self, x: Tensor) -> bool:
        if self._wires is not None:
            return self._wires.may_schedule(x)
        return x.is_cpu and x.nbytes <= MAX_NBYTES and not kernels.reference_is_forced()

    def _goes_on(self, x: Tensor) -> bool | None:
        """True if a loss has been left that the layer's first sum takes along; None for one left to another sum."""
        if self._wires is None:
            return False
        return self._wires.feedback.goes_on(self._first_sum, x.shape[0], x.shape[2])

    def _now(self) -> list[Any]:
        """All that the schedules stand on: forwards, modules, weights and ways to compute inside."""
        state = self._forwards()
        state += [each.get("batch_invariant") for each in self._attributes]
        state += [child for children in self._children for child in children.values()]
        state += [w.data_ptr() for weights in self._weights for w in weights.values() if w is not None]
        return [*state, self._config._attn_implementation]

    def _forwards(self) -> list[Any]:
        return [each.get("forward") for each in self._attributes]

    def _forget(self) -> None:
        self._state, forwards = self._now(), self._forwards()
        homes = {type(child).__module__ for children in self._children for child in children.values()}
        if forwards != self._given:
            homes |= {str(getattr(each, "__module__", "")) for each in forwards if each is not None}
        self._is_known = HOMES.issuperset(home.partition(".")[0] for home in homes)
        self._schedules.clear()
        self._attempts.clear()

    def _record(self, key: Key, layer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Any:
        attempts = self._attempts.get(key, 0)
        if attempts == ATTEMPTS or (not attempts and len(self._attempts) == MAX_KINDS):
            return self._whole(layer, x, **kwargs)
        self._attempts[key] = attempts + 1
        with recording(self._wires) as recorder:
            out = self._whole(layer, x, **kwargs)
        try:
            self._schedules[key] = Scheduled(self._wires, recorder, x, out, kwargs["position_embeddings"])
        except NotRecordableError as reason:
            logger.debug("layer %d is not recorded: %s", self._index, reason)
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
