"""GGUF files of small random models, made with the package gguf as llama.cpp's converter makes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

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

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128),
    "gemma2": lambda: Gemma2Config(**HEADS, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, sliding_window=6),
    "phi3": lambda: Phi3Config(**SIZES, resid_pdrop=0.0),
}


def random_model(name: str) -> PreTrainedModel:
    """A model of `CONFIGS` in FP32, whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]()).float()
    for key, value in model.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, mean=float(key.endswith("norm.weight") and "gemma" not in name), std=0.1)
    return model


def kinds_of_rows(name: str, value: np.ndarray, kind: Kind) -> Kind:
    """The type that llama.cpp takes where it is asked for `kind`: norms and biases stay plain."""
    size = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if value.ndim == 2 and value.shape[1] % size == 0 else Kind.F32


def write_gguf(
    path: Path,
    name: str,
    kind: Kind | Mapping[str, Kind],
    *,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> PreTrainedModel:
    """Write a random model; matrices in `kind`, or by name in the file (others plain). The model, unrounded."""
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
    add(writer)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
    )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for key, parameter in model.state_dict().items():
        if key in tied:
            continue
        value = parameter.numpy()
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert stored is not None, key
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if "gemma" in name and key.endswith("norm.weight"):
            value = value + 1
        wanted = kind.get(stored, Kind.F32) if isinstance(kind, Mapping) else kind
        taken = kinds_of_rows(stored, value, wanted)
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(value), taken), raw_dtype=taken)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def loaded(path: Path) -> dict[str, Tensor]:
    """The parameters that Transformers unpacks from a file, FP32."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return dict(model.named_parameters())
