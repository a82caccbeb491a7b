"""The weights of a Llama from the folder where Transformers has it, in the order of rows that its peers use."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf8"))
    return found


def names(num_layers: int) -> list[str]:
    """Of all weights, from the embedding to the logits' own."""
    layers = [f"model.layers.{index}.{name}" for index in range(num_layers) for name in LAYER]
    return [f"{name}.weight" for name in ("model.embed_tokens", *layers, "model.norm", "lm_head")]


def read_weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each weight, and the weight in FP32."""
    config = read_config(folder)
    num_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in names(config["num_hidden_layers"]):
            weight = file.get_tensor(name).float().numpy()
            heads = num_heads.get(name.split(".")[-2])
            yield name, weight if heads is None else _in_turns(weight, heads)


def _in_turns(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head: what rotates together stands side by side, where Transformers has it half a head apart."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
