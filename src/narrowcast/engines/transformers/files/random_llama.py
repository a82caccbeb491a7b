"""Llamas with random weights, to time: how fast a model answers does not depend on what it says."""

from pathlib import Path

import torch

MOST_POSITIONS = 1 << 17


def save_random_llama(
    folder: Path, *, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int
) -> None:
    """Save a Llama of these sizes in BF16 into `folder`."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MOST_POSITIONS,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
