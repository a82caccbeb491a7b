"""Small random models and ranges to test with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from narrowcast.codecs import Codec, Ranges, recipe

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 140,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-biased": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-odd": lambda: LlamaConfig(**SMALL | {"hidden_size": 76, "intermediate_size": 141, "head_dim": 18}),
    "llama-starved": lambda: LlamaConfig(**SMALL | {"intermediate_size": 5, "vocab_size": 106}),  # a rank holds none
    "mistral": lambda: MistralConfig(**SMALL, head_dim=24, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=24),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=24, query_pre_attn_scalar=24, sliding_window=6),
    "phi3": lambda: Phi3Config(**SMALL, resid_pdrop=0.0),  # fused projections
    "phi3-starved": lambda: Phi3Config(**SMALL | {"intermediate_size": 1}, resid_pdrop=0.0),  # ranks without columns
    "olmo2": lambda: Olmo2Config(**SMALL),  # norms over all heads: q, k and v are gathered
    "mixtral": lambda: MixtralConfig(**SMALL | {"intermediate_size": 96}, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=24, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, mlp_only_layers=[0]
    ),
}

# Masks that differ by layer, windows shorter than half of a prompt, states that recur.
MORE = {
    "gemma3": lambda: Gemma3TextConfig(**SMALL | {"num_hidden_layers": 7}, head_dim=24, sliding_window=16),
    "qwen3-next": lambda: Qwen3NextConfig(
        **SMALL | {"num_hidden_layers": 4},
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=24,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=24,
        linear_value_head_dim=24,
    ),
}


def save_random(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A model of `CONFIGS` or `MORE` with random weights (biases too), saved for `from_pretrained`."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config((CONFIGS | MORE)[name]()).to(dtype)
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    return folder


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibrated(codec: str, x_RTE: Tensor) -> tuple[Codec, Codec]:
    """The codecs for partial sums and for their sum, calibrated on `x_RTE` itself."""
    made = recipe(codec)
    return made.codec(Ranges.of(x_RTE)), made.codec(Ranges.of(x_RTE.float().sum(dim=0, keepdim=True)))
