"""Weights of whole and of split models: what this rank holds, and what tells one model from another."""

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from narrowcast.engines.forwards import chunk
from narrowcast.plan import ModelFingerprint

CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
)
NUM_SAMPLES = 16  # of each weight: a rank of 16 or fewer holds at least one


def fingerprint(model: nn.Module, summed: dict[str, nn.Module]) -> ModelFingerprint:
    """Config fields; digests of columns of the weights whose outputs are summed and of rows of the embedding."""
    config = cast(Any, model).config.get_text_config()
    samples = {name: _digests(_sampled(module), dim=-1) for name, module in summed.items()}
    embedding = cast(Any, model).get_input_embeddings()
    if isinstance(embedding, nn.Embedding):  # not on every stage of a pipeline
        samples["embedding"] = _digests(embedding.weight, dim=0)
    fields = {field: getattr(config, field) for field in CONFIG_FIELDS if hasattr(config, field)}
    fields["rope_theta"] = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    return ModelFingerprint(config=fields, samples=samples)


def local(weight: Tensor) -> Tensor:
    """What this rank holds of `weight`."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _sampled(module: nn.Module) -> Tensor:
    """The weight [E, I], or of experts [X, E, I], whose columns are sampled."""
    return cast(Tensor, module.weight if isinstance(module, nn.Linear) else module.down_proj)


def _digests(weight: Tensor, dim: int) -> list[str | None]:
    """Digests in BF16 of slices at fixed places along `dim` (of experts: each from one expert)."""
    held = [_own_chunk(weight, axis) for axis in range(weight.ndim)]
    digests: list[str | None] = []
    for sample in range(NUM_SAMPLES):
        places = {dim % weight.ndim: (2 * sample + 1) * weight.shape[dim] // (2 * NUM_SAMPLES)}
        if weight.ndim == 3:
            places[0] = sample % weight.shape[0]
        here = all(held[axis].start <= place < held[axis].stop for axis, place in places.items())
        digests.append(_digest(_slice(local(weight), held, places)) if here else None)
    return digests


def _slice(held_part: Tensor, held: list[slice], places: dict[int, int]) -> Tensor:
    values = held_part.detach()
    for axis in sorted(places, reverse=True):
        values = values.select(axis, places[axis] - held[axis].start)
    return values


def _digest(values: Tensor) -> str:
    raw = values.bfloat16().contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=4).hexdigest()


def _own_chunk(weight: Tensor, axis: int) -> slice:
    """What this rank holds of a weight's `axis`: all of it unless the weight is split there."""
    if isinstance(weight, DTensor):
        (placement,) = weight.placements
        if isinstance(placement, Shard) and placement.dim % weight.ndim == axis:
            return chunk(weight.shape[axis], weight.device_mesh.get_local_rank(), weight.device_mesh.size())
    return slice(0, weight.shape[axis])
