"""The choice of the next token from logits, and log-probabilities of what was or might have been chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.serving.requests import Request, Token

_FEW = 256  # likeliest tokens, among which those of `top_p` are looked for before all are sorted


class Chooser:
    """Chooses the tokens of one request, one after the other; seeded where the request says so."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    def choose(self, logits_V: Tensor) -> Token:
        """The next token."""
        id = self._id(logits_V)
        if self._request.num_top is None:
            return Token(id)
        return scored(logits_V[None], [id], self._request.num_top)[0]

    def _id(self, logits_V: Tensor) -> int:
        if not self._request.temperature:
            return int(logits_V.argmax())
        probs_V = torch.softmax(logits_V / self._request.temperature, dim=-1)
        if self._request.top_p >= 1:
            return int(torch.multinomial(probs_V, 1, generator=self._generator))
        probs_K, ids_K = probs_V.topk(min(_FEW, len(probs_V)))
        if probs_K.sum() < self._request.top_p:
            probs_K, ids_K = probs_V.sort(descending=True)
        before_K = probs_K.cumsum(dim=0) - probs_K
        kept_K = probs_K * (before_K < self._request.top_p)
        return int(ids_K[torch.multinomial(kept_K, 1, generator=self._generator)])


def scored(logits_TV: Tensor, ids: Sequence[int], num_top: int) -> list[Token]:
    """The tokens `ids` [T] with their log-probabilities, and those of the `num_top` likeliest at each place."""
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    own_T = logprobs_TV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    tops_TK, ids_TK = (each.tolist() for each in logprobs_TV.topk(min(num_top, logprobs_TV.shape[1])))
    return [
        Token(id, own, tuple(zip(likeliest, tops, strict=True)))
        for id, own, likeliest, tops in zip(ids, own_T, ids_TK, tops_TK, strict=True)
    ]
