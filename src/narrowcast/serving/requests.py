"""Requests to continue a text, and what comes of them piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue.

    `prompt`: token ids, one at least. `temperature` 0: the likeliest token; otherwise a draw from the likeliest ones
    that have `top_p` of the probability together, the same for the same `seed`. `stop`: texts before which the answer
    ends. `num_top`: of how many tokens log-probabilities are asked for beside the chosen one's; None for none at all.
    `scored`: those of the prompt too. `ignore_eos`: tokens that end a text do not end this one.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_top: int | None = None
    scored: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """A token, its log-probability before temperature, in nats, and the likeliest ones at its place.

    Without `logprob` where none was asked for, and for the first token of a prompt, before which there is nothing.
    """

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """More of an answer: the text that is settled since the last piece, and the tokens, which may run ahead of it.

    `prompt`: its scored tokens, in the first piece, where they were asked for. `finish`: in the last piece.
    """

    text: str = ""
    tokens: Sequence[Token] = ()
    prompt: Sequence[Token] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Failure:
    """The end of a request that could not be answered, with a sentence for whoever asked."""

    message: str
