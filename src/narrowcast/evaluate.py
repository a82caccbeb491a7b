"""How much a coded model differs from the uncompressed one: KL divergence, top-1 agreement, perplexity."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from narrowcast.integrations import device_of


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over `num_tokens` scored positions.

    `kl_nats`: KL(reference || model) in nats. `top1_agreement`: share of positions where both rank the same token
    first. `perplexity`: of the model on the text's next tokens.
    """

    perplexity: float
    kl_nats: float
    top1_agreement: float
    num_tokens: int


@torch.no_grad()
def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T, V] in fp32 on the CPU, for token ids [B, T]."""
    logits: Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False).logits
    return logits.float().log_softmax(dim=-1).cpu()


def compare(reference: Iterable[Tensor], model: Iterable[Tensor], batches: Sequence[Tensor]) -> Score:
    """Score `model` against `reference`: log-probabilities [B, T, V] of both for each batch of ids [B, T]."""
    nll = kl = 0.0
    agreed = scored = predicted = 0
    for expected, found, ids in zip(reference, model, batches, strict=True):
        expected, found = expected.double(), found.double()
        kl += (expected.exp() * (expected - found)).sum().item()
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        nll -= found[:, :-1].gather(-1, ids[:, 1:, None]).sum().item()
        scored, predicted = scored + ids.numel(), predicted + ids[:, 1:].numel()
    return Score(
        perplexity=math.exp(nll / predicted), kl_nats=kl / scored, top1_agreement=agreed / scored, num_tokens=scored
    )
