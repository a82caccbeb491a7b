"""Long prompts in halves, as chunked prefill has them, with the model's own code for each.

Halves run one after the other or in turns (`Wires.run_parts`). Either way each sees the cache as of its own start:
lengths and masks are those of the tokens before it, whatever has been written by then.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forwards
from narrowcast.engines.transformers.seam.pipeline import own_layers, stage_of
from narrowcast.engines.transformers.seam.stage_cache import tell_own_lengths_
from narrowcast.runtime.prompts import Prompts
from narrowcast.runtime.wires import Wires

# What a forward may be given, besides what says nothing, and still run in halves.
DIVISIBLE = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class IndivisibleError(Exception):
    """This forward cannot run in halves; says why."""


def halve_prompts(model: nn.Module, wires: Wires, prompts: Prompts, forwards: Forwards) -> None:
    """Let `model` run long prompts in halves where it can."""
    signature, whole = inspect.signature(type(model).forward), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return whole(*args, **kwargs)
        arguments = _arguments(signature, model, args, kwargs)
        ids = arguments.get("input_ids")
        halves = [] if ids is None else prompts.halves(ids.shape[-1])
        if not halves:
            return whole(*args, **kwargs)
        try:
            prompt = Prompt(model, signature, whole, arguments)
        except IndivisibleError as reason:
            prompts.as_one(str(reason))
            return whole(*args, **kwargs)
        prompts.in_halves()
        return prompt.joined(wires.run_parts([prompt.half(start, stop) for start, stop in halves]))

    forwards.replace(model, forward)


def _arguments(
    signature: inspect.Signature, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by name, without those that say nothing."""
    bound = dict(signature.bind(model, *args, **kwargs).arguments)
    for name, each in signature.parameters.items():
        if each.kind is each.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    del bound["self"]
    silent = {name for name, value in bound.items() if value is None or (value is False and name != "use_cache")}
    if bound.get("return_dict") is True:
        silent.add("return_dict")
    return {name: value for name, value in bound.items() if name not in silent}


class Prompt:
    """One forward of a causal model that can run in halves. IndivisibleError if it cannot."""

    def __init__(
        self, model: Any, signature: inspect.Signature, whole: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> None:
        cache = arguments.get("past_key_values")
        _tell_own_lengths(cache, model)
        _check(model, signature, arguments)
        self._model, self._whole, self._ids = model, whole, arguments["input_ids"]
        self._position_ids, self._mask = arguments.get("position_ids"), arguments.get("attention_mask")
        self._num_kept = arguments.get("logits_to_keep", 0) or self._ids.shape[1]
        self._keeps_cache = arguments.get("use_cache", True)
        self._cache = _new_cache(model) if cache is None else cache

    def half(self, start: int, stop: int) -> Callable[[], Any]:
        """The forward of the tokens from `start` on, up to `stop`."""
        view = as_of(self._cache, start)
        inputs = {"input_ids": self._ids[:, start:stop], "past_key_values": view, "use_cache": True}
        if self._position_ids is not None:
            inputs["position_ids"] = self._position_ids[..., start:stop]
        if self._mask is not None:
            inputs["attention_mask"] = _mask_of(self._model, self._mask, view, start, stop)
        num_kept = self._num_kept - (self._ids.shape[1] - stop)
        if num_kept <= 0 and stage_of(self._model) is not None:
            return lambda: self._whole(**inputs, logits_to_keep=self._ids.new_empty(0))
        if num_kept <= 0:  # nobody asks for these logits
            return lambda: self._model.get_decoder()(**inputs)
        return lambda: self._whole(**inputs, logits_to_keep=min(num_kept, stop - start))

    def joined(self, outputs: Sequence[Any]) -> Any:
        """The output of the whole forward."""
        last, logits = outputs[-1], [each.logits for each in outputs if "logits" in each and each.logits.numel()]
        if len(logits) > 1:
            last.logits = torch.cat(logits, dim=1)
        last.past_key_values = self._cache if self._keeps_cache else None
        return last


def _check(model: Any, signature: inspect.Signature, arguments: Mapping[str, Any]) -> None:
    """IndivisibleError where a forward with these arguments cannot run in halves."""
    from transformers.cache_utils import Cache

    if model.config.is_encoder_decoder or not {"past_key_values", "logits_to_keep"} <= signature.parameters.keys():
        raise IndivisibleError("no decoder with a cache")
    if others := sorted(arguments.keys() - DIVISIBLE):
        raise IndivisibleError(f"{', '.join(others[:2])}{', ...' if len(others) > 2 else ''} given")
    if not isinstance(arguments.get("logits_to_keep", 0), int):
        raise IndivisibleError("logits of chosen places")
    cache = arguments.get("past_key_values")
    if cache is not None and (not isinstance(cache, Cache) or cache.offloading):
        raise IndivisibleError("a cache of another kind")
    if cache is not None and _is_filled(cache):
        raise IndivisibleError("a filled cache")
    mask = arguments.get("attention_mask")
    masks = mask.values() if isinstance(mask, Mapping) else () if mask is None else (mask,)
    if not all(isinstance(each, Tensor) and each.ndim in (2, 4) for each in masks):
        raise IndivisibleError("a mask of another kind")


def _is_filled(cache: Any) -> bool:
    if all(_attention_layer(cache, index) is None for index in range(len(cache))):
        return bool(len(cache)) and bool(cache.has_previous_state())  # states that recur alone
    return int(cache.get_seq_length()) > 0


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    _tell_own_lengths(cache, model)
    return cache


def _tell_own_lengths(cache: Any, model: Any) -> None:
    if stage_of(model) is not None:
        tell_own_lengths_(cache, own_layers(model))


def _mask_of(model: Any, mask: Any, view: Any, start: int, stop: int) -> Any:
    """The part of a mask that is for the tokens from `start` on: of places [B, T], or [B, 1, T, K] by kind of layer."""
    if isinstance(mask, Mapping):
        kinds = model.config.get_text_config().layer_types
        return {kind: _rows(each, view, kinds.index(kind), start, stop) for kind, each in mask.items()}
    return mask[:, :stop] if mask.ndim == 2 else _rows(mask, view, 0, start, stop)


def _rows(mask: Tensor, view: Any, layer: int, start: int, stop: int) -> Tensor:
    """The rows of the tokens from `start` on, over the keys that a layer then has, the first of them at an offset."""
    num_keys, first = view.get_mask_sizes(stop - start, layer)
    return mask[..., start:stop, first : first + num_keys]


def as_of(cache: Any, start: int) -> Any:
    """The cache as a half sees it that begins with token `start`: its lengths are of then, its layers are shared.

    The other half may have written more, into some layers: what asks for lengths would be told wrong ones, without an
    error in models whose masks differ by layer.
    """
    view = copy.copy(cache)

    def seq_length(layer_idx: int = 0) -> int:
        return start

    def mask_sizes(query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = _attention_layer(cache, layer_idx)
        return (start + query_length, 0) if layer is None else _layer_as_of(layer, start).get_mask_sizes(query_length)

    def has_previous_state(layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return start > 0 if layer_idx is None else bool(cache.has_previous_state(layer_idx, state_idx))

    view.get_seq_length = view.get_query_offset = seq_length
    view.get_mask_sizes, view.has_previous_state = mask_sizes, has_previous_state
    return view


def _attention_layer(cache: Any, index: int) -> Any:
    """The layer that tells the sizes of masks, the first with keys in place of one without; None if not made yet."""
    if index >= len(cache.layers):
        return None
    layers = [cache.layers[index], *cache.layers]
    return next((layer for layer in layers if hasattr(layer, "get_mask_sizes")), None)


def _layer_as_of(layer: Any, start: int) -> Any:
    then = copy.copy(layer)
    then.get_seq_length = lambda: start
    for name in ("cumulative_length", "cumulative_length_int"):
        if isinstance(getattr(then, name, None), int):
            setattr(then, name, start)
    return then
