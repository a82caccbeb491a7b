"""Continuations of prompts: greedy, or sampled alike on all ranks; told token by token."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from narrowcast.engines import device_of
from narrowcast.progress import Progress, tell


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens: the likeliest at `temperature` 0; otherwise drawn, the same ones for the same `seed`.

    What else limits the draw, such as top-k and top-p, is as the model's own generation config has it.
    """

    temperature: float = 0.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Said:
    """Told before the first token, and at each: the next ids by prompt, of those that have not ended."""

    ids: dict[int, int]


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: Sequence[Tensor], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """Ids that `model` adds to each prompt [1, T], up to the end of text; each is told (`Said`) when it is known.

    All prompts go in one batch, padded on the left.
    """
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        torch.manual_seed(sampling.seed)
        drawn = {"do_sample": True, "temperature": sampling.temperature}
    ids, mask = _padded(prompts), _padded([torch.ones_like(prompt) for prompt in prompts])
    device = device_of(model)
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {ends} if isinstance(ends, int) else set(ends or ())  # type: ignore[arg-type]
    generated = model.generate(  # type: ignore[operator]
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=0,  # masked wherever it stands
        streamer=_Telling(len(prompts), ends),
        **drawn,
    )
    return [list(itertools.takewhile(lambda id: id not in ends, row)) for row in generated[:, ids.shape[1] :].tolist()]


class _Telling:
    """A streamer, as Transformers calls it: with the prompts first, then with a token for each."""

    def __init__(self, num_prompts: int, ends: set[int]) -> None:
        self._going_on, self._ends, self._begun = list(range(num_prompts)), ends, False

    def put(self, ids: Tensor) -> None:
        if not self._begun:
            self._begun = True
            tell(Progress("reading prompts"))
            tell(Said({}))
            return
        found = ids.tolist()
        self._going_on = [place for place in self._going_on if found[place] not in self._ends]
        tell(Said({place: found[place] for place in self._going_on}))

    def end(self) -> None:
        pass


def _padded(prompts: Sequence[Tensor]) -> Tensor:
    return pad_sequence([prompt[0] for prompt in prompts], batch_first=True, padding_side="left")
