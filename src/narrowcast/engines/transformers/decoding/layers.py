"""Forwards of attention, norms and MLPs for decoding steps: what is no product is one call of C++.

They compute what the classes' own forwards do, rounded where these round, and leave to them whatever they do not serve:
attention in long prompts, gradients, compiled graphs. Layers are called as modules, with what was put in place of their
forwards.
"""

from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.codecs.kernels import cpu, reference_is_forced
from narrowcast.engines.transformers.decoding import growing
from narrowcast.engines.transformers.decoding.interface import ITS_OWN, NAME, attention
from narrowcast.runtime.attention import MOST_QUERIES, NewTokens, attend, fits, is_mask
from narrowcast.runtime.attention_reference import turned

# Attributes of modules by which layers that share an input are asked at once: given tokens, the outputs of each, or
# None where they are to be asked one by one. `Forwards.set` sets them.
QKV, GATE_UP = "fused_qkv", "fused_gate_up"
FUSED = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}

_LARGE = 1 << 18  # values from which on several threads may share a norm's tokens


def serves(x: Tensor) -> bool:
    """True for a plain tensor on the CPU, at inference."""
    is_plain = type(x) is Tensor and x.is_cpu and x.dtype in cpu.DTYPES
    return is_plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of Llama and its like; tokens go into the cache and are attended to in one call."""
    if (
        position_embeddings is None
        or past_key_values is None
        or hidden_states.shape[1] > MOST_QUERIES
        or not serves(hidden_states)
        or self.training
        or self.config._attn_implementation != NAME
        or any(kwargs.get(name) is not None for name in ITS_OWN)
    ):
        own: tuple[Tensor, None] = type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return own
    q, k, v = _projected(self, hidden_states)
    heads = _attended(self, q, k, v, position_embeddings, attention_mask, past_key_values, kwargs)
    out: Tensor = self.o_proj(heads.reshape(*hidden_states.shape[:-1], -1))
    return out, None


def _projected(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, T, D], with their norms, if any."""
    fused, shape = vars(self).get(QKV), (*x.shape[:-1], -1, self.head_dim)
    parts = None if fused is None else fused(x)
    if parts is None:
        parts = _in_one(self, x) if "qkv_proj" in self._modules else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
    q, k, v = (part.view(shape) for part in parts)
    if "q_norm" in self._modules:
        q, k = self.q_norm(q), self.k_norm(k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _in_one(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """As Phi-3 has them, in one layer."""
    qkv: Tensor = self.qkv_proj(x)
    size = self.num_key_value_heads * self.head_dim
    return tuple(qkv.split([qkv.shape[-1] - 2 * size, size, size], dim=-1))


def _attended(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """The attention [B, T, H, D] of new tokens, which go into the cache."""
    num_tokens, is_made = q.shape[2], self.layer_idx < len(cache.layers) and not cache.offloading
    layer = cache.layers[self.layer_idx] if is_made else None
    num_keys, softcap = growing.length(layer, num_tokens), getattr(self, "attn_logit_softcapping", None)
    new = NewTokens(k, v, *position_embeddings)
    if layer is not None and num_keys is not None and fits(q, layer.keys, layer.values) and new.fit(q):
        seen = None if mask is None else mask[..., : num_keys + num_tokens]
        if num_tokens == 1 if seen is None else is_mask(seen, q, num_keys + num_tokens):
            keys, values = growing.grow(layer, num_tokens)
            return attend(q, keys, values, scale=self.scaling, mask=seen, softcap=softcap or 0.0, new=new)
    q, k = (turned(x, *position_embeddings) for x in (q, k))
    k, v = cache.update(k, v, self.layer_idx)
    return attention(self, q, k, v, mask, scaling=self.scaling, softcap=softcap, **kwargs)[0]


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """An RMS norm whose result is multiplied with its weights once it is rounded, as Llama's."""
    return _norm(self, hidden_states, from_one=False)


def norm_from_one_forward(self: Any, x: Tensor) -> Tensor:
    """An RMS norm whose weights are added to one, as Gemma's."""
    return _norm(self, x, from_one=True)


def _norm(self: Any, x: Tensor, *, from_one: bool) -> Tensor:
    weight = self.weight
    is_alike = type(weight) is nn.Parameter and weight.dtype is x.dtype and weight.is_contiguous()
    if not serves(x) or not is_alike or reference_is_forced():
        own: Tensor = type(self).forward(self, x)
        return own
    assert cpu.native is not None
    x, size = x.contiguous(), len(weight)
    out = torch.empty_like(x)
    epsilon = self.eps if from_one else self.variance_epsilon
    if x.numel() >= _LARGE:
        cpu.limit_threads()
    cpu.native.rms_norm(
        cpu.DTYPES[x.dtype],
        x.data_ptr(),
        size,
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // size,
        size,
        epsilon,
        from_one,
    )
    return out


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """The gated MLP of Llama and its like, where gate and up are asked at once."""
    fused = vars(self).get(GATE_UP)
    parts = None if fused is None else fused(x)
    if parts is None:
        own: Tensor = type(self).forward(self, x)
        return own
    gate, up = parts
    out: Tensor = self.down_proj(self.act_fn(gate) * up)
    return out
