"""GGUF files of small random models, made with the package gguf as llama.cpp's converter makes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
Kind = gguf.GGMLQuantizationType

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
HEADS = SIZES | {"head_dim": 48}

# Types of blocks that the package does not quantize to: where their FP16 scales are.
SCALES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128),
    "gemma2": lambda: Gemma2Config(**HEADS, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, sliding_window=6),
    "phi3": lambda: Phi3Config(**SIZES, resid_pdrop=0.0),
}

# Models of which Transformers' own loader of GGUF files leaves something out.
INCOMPLETE: dict[str, Callable[[], Any]] = {
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen3-small-heads": lambda: Qwen3Config(**HEADS),
}

# Mixtures of experts: Mixtral's files say "llama".
EXPERTS: dict[str, Callable[[], Any]] = {
    "llama-experts": lambda: MixtralConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3moe": lambda: Qwen3MoeConfig(
        **HEADS, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, norm_topk_prob=True
    ),
}


def random_model(name: str) -> PreTrainedModel:
    """A model of `CONFIGS` in FP32, whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config((CONFIGS | INCOMPLETE | EXPERTS)[name]()).float()
    for key, value in model.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, mean=float(key.endswith("norm.weight") and "gemma" not in name), std=0.1)
    return model


def blocks(kind: Kind, num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray:
    """Rows of random blocks whose scales are small, as bytes: the package quantizes to few types."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(seed).integers(0, 256, (num_rows, num_columns // size, nbytes), dtype=np.uint8)
    scales = np.random.default_rng(seed + 1).uniform(0.001, 0.01, (num_rows, num_columns // size, 1))
    for place in SCALES[kind]:
        made[..., place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return made.reshape(num_rows, -1)


def stored_as(value: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """The bytes of a tensor where llama.cpp is asked for `kind`: norms and biases stay plain."""
    value = np.ascontiguousarray(value)
    if value.ndim < 2 or value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return value, Kind.F32
    if kind not in SCALES:
        return gguf.quants.quantize(value, kind), kind
    *outer, num_columns = value.shape
    return blocks(kind, int(np.prod(outer)), num_columns).reshape(*outer, -1), kind


def by_expert(key: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that llama.cpp makes of a parameter: of gate and up of all experts two."""
    if not key.endswith("experts.gate_up_proj"):
        return {key: value}
    experts, half = key.removesuffix("gate_up_proj"), value.shape[1] // 2
    return {f"{experts}gate_proj": value[:, :half], f"{experts}up_proj": value[:, half:]}


def write_gguf(
    path: Path,
    name: str,
    kind: Kind,
    others: Mapping[str, Kind] | None = None,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    *,
    one_by_one: bool = False,
) -> PreTrainedModel:
    """Write a random model; matrices in `kind`, `others` by name in the file. The model, unrounded.

    `one_by_one`: each matrix of an expert is a tensor, as in files of 2023.
    """
    model = random_model(name)
    config: Any = model.config
    architecture = name.split("-")[0]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_pad_token_id(config.pad_token_id)
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    if name in EXPERTS:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if size := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(size)
    add(writer)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
    )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for key, parameter in model.state_dict().items():
        if key in tied:
            continue
        for part, value in by_expert(key, parameter.numpy()).items():
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert stored is not None, part
            if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
                heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            if "gemma" in name and key.endswith("norm.weight"):
                value = value + 1
            tensors = {stored: value}
            if "experts" in key:
                tensors = {f"{stored}.weight": value}
                if one_by_one:
                    base = stored.removesuffix("_exps")
                    tensors = {f"{base}.{number}.weight": each for number, each in enumerate(value)}
            for each, content in tensors.items():
                data, taken = stored_as(content, (others or {}).get(each, kind))
                writer.add_tensor(each, data, raw_dtype=taken)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def loaded(path: Path, **options: Any) -> dict[str, Tensor]:
    """The parameters that Transformers unpacks from a file, FP32."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )
    return dict(model.named_parameters())
