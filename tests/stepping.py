"""Small models of known families, decoding step by step, and how many of their layers ran as recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from models import random_ids
from narrowcast.engines.transformers.decoding import recorded
from narrowcast.runtime.scheduled import Scheduled

NUM_LAYERS, NUM_STEPS = 2, 8
FIRST = 2  # steps until all is recorded: small sums have their steps once, caches get room to grow in


SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 192,  # 96 a rank: not only whole vectors
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),  # shorter than the text
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES, resid_pdrop=0.0),
    "gemma2": lambda: Gemma2Config(**SIZES),
    "gemma3_text": lambda: Gemma3TextConfig(**SIZES),
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many layers have run as recorded so far."""
    runs, run = [0], Scheduled.run

    def counting(self: Scheduled, *args: Any) -> Tensor:
        runs[0] += 1
        return run(self, *args)

    Scheduled.run = counting  # type: ignore[method-assign]
    try:
        yield runs
    finally:
        Scheduled.run = run  # type: ignore[method-assign]


@torch.no_grad()
def steps(model: Any, num_sequences: int = 1, padding: int = 0) -> list[Tensor]:
    """Logits of a prompt, then of one token after another; the first text begins with padding."""
    ids = random_ids(num_sequences, 9)
    mask = torch.ones(num_sequences, 9 + NUM_STEPS, dtype=torch.int64)
    mask[0, :padding] = 0
    found = model(ids, attention_mask=mask[:, :9], use_cache=True)
    logits = [found.logits]
    for length in range(10, 10 + NUM_STEPS):
        ids = logits[-1][:, -1:].argmax(-1)
        found = model(ids, attention_mask=mask[:, :length], past_key_values=found.past_key_values, use_cache=True)
        logits.append(found.logits)
    return logits


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def by_modules() -> Iterator[None]:
    """Nothing new is recorded."""
    recorded.ATTEMPTS, attempts = 0, recorded.ATTEMPTS
    try:
        yield
    finally:
        recorded.ATTEMPTS = attempts
