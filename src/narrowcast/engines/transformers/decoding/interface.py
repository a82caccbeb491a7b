"""Our attention of few queries, as an `attn_implementation` of Transformers; where it does not serve, PyTorch's runs.

Masks are those of SDPA: none where all keys are seen, else bool [B, 1, T, C].
"""

import functools
import inspect
import re
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.codecs.kernels import cpu
from narrowcast.engines.forwards import Bound
from narrowcast.runtime.attention import attend, fits

NAME = "narrowcast"

# Arguments with which SDPA runs, whatever it makes of them. It ignores all others: masks have sliding windows in them.
ITS_OWN = "position_bias", "s_aux"


def choose(model: nn.Module) -> None:
    """Let a model on the CPU that has Transformers' default, SDPA, attend to few queries with our kernel.

    Models that cap scores, which SDPA does not, have "eager" for a default.
    """
    engine = cast(Any, model)
    if cpu.native is None or engine.device.type != "cpu" or engine.config._attn_implementation != _default(engine):
        return
    if not type(engine)._can_set_attn_implementation() or _asks_for_sdpa(type(engine)):
        return
    register()
    engine.set_attn_implementation(NAME)
    vars(engine)["init_continuous_batching"] = Bound(init_continuous_batching, engine)


def _default(engine: Any) -> str:
    return "sdpa" if engine._supports_sdpa or _softcap(engine.config) is None else "eager"


def _softcap(config: Any) -> float | None:
    return getattr(config, "attn_logit_softcapping", None)


def register() -> None:
    """Let Transformers know `attn_implementation="narrowcast"`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _asks_for_sdpa(kind: type[nn.Module]) -> bool:
    """True for models that do something else where SDPA runs, which they know by its name."""
    return (
        re.search(r"_attn_implementation (==|!=|in|not in) ", inspect.getsource(sys.modules[kind.__module__]))
        is not None
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The outputs [B, T, H, D] of queries [B, H, T, D] over keys and values [B, G, C, D], as of Transformers' SDPA.

    Shapes and dtypes decide what runs, so that ranks agree. Gradients, dropout, biases and sinks rule ours out.
    `cache` is that of continuous batching; `kwargs` then says which tokens and keys are whose.
    """
    if dropout or any(kwargs.get(name) is not None for name in ITS_OWN):
        kwargs["softcap"] = softcap  # which SDPA refuses in words of its own
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, cache=cache, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is not None:
        from narrowcast.engines.transformers.decoding import paging  # which takes PyTorch's compiler along

        alone = functools.partial(_outputs, module, scaling=scale, softcap=softcap)
        allocator = cache.layer_to_allocator[module.layer_idx]
        given = allocator, module.layer_idx, query, key, value, alone, scale, softcap or 0.0
        return paging.attention(*given, **kwargs), None
    num_queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and num_queries > 1 and attention_mask is None
    if causal:  # what stands behind the queries' own keys is the rest of an empty static cache
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    if not _differentiates(query, key, value) and fits(query, key, value, attention_mask):
        return attend(query, key, value, scale=scale, mask=attention_mask, softcap=softcap or 0.0, causal=causal), None
    if softcap is not None:
        return _capped(query, key, value, attention_mask, scale, softcap, causal), None
    return _sdpa(module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs)


def _outputs(*args: Any, **kwargs: Any) -> Tensor:
    return attention(*args, **kwargs)[0]


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool
) -> Tensor:
    """As Gemma 2's own "eager" attention."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.tanh(query @ key.mT * scale / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        seen = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if seen else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return cast(tuple[Tensor, None], sdpa_attention_forward(*args, **kwargs))


def _differentiates(*tensors: Tensor) -> bool:
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))


def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As Transformers', whose manager is made for no names but those that it knows, and then makes masks for them."""
    if self.config._attn_implementation != NAME:
        return type(self).init_continuous_batching(self, *args, **kwargs)
    self.set_attn_implementation(_default(self))
    try:
        manager = type(self).init_continuous_batching(self, *args, **kwargs)
    finally:
        self.set_attn_implementation(NAME)
    manager._original_attn_impl = None  # what it would go back to when it stops
    return manager
