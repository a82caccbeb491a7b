"""Greedy continuations of prompts."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from narrowcast.engines import device_of


@torch.no_grad()
def continuations(model: nn.Module, prompts: Sequence[Tensor], max_new_tokens: int) -> list[list[int]]:
    """Ids that `model` adds to each prompt [1, T], up to the end of text.

    All prompts go in one batch, padded on the left.
    """
    ids, mask = _padded(prompts), _padded([torch.ones_like(prompt) for prompt in prompts])
    device = device_of(model)
    generated = model.generate(  # type: ignore[operator]
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,  # masked wherever it stands
    )
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {ends} if isinstance(ends, int) else set(ends or ())  # type: ignore[arg-type]
    return [list(itertools.takewhile(lambda id: id not in ends, row)) for row in generated[:, ids.shape[1] :].tolist()]


def _padded(prompts: Sequence[Tensor]) -> Tensor:
    return pad_sequence([prompt[0] for prompt in prompts], batch_first=True, padding_side="left")
