"""The identity of a model in whatever engine: fields of its config, digests of samples of its weights."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from narrowcast.engines.layered import by_layer

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
EMBEDDING = "embedding"  # whatever an engine calls it


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of a text model's config that matter, those that it has."""
    values = {field: by_layer(config, field) for field in CONFIG_FIELDS}
    fields: dict[str, Any] = {field: each[0] if len(each) == 1 else each for field, each in values.items() if each}
    fields["rope_theta"] = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    return fields


def sample_places(size: int) -> list[int]:
    """The rows or columns, of so many, by which a weight is told from others."""
    return [(2 * sample + 1) * size // (2 * NUM_SAMPLES) for sample in range(NUM_SAMPLES)]


def digest(values: Tensor) -> str:
    """That of a sample, in BF16."""
    raw = values.bfloat16().contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=4).hexdigest()
