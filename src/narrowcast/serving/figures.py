"""Figures of requests as vLLM counts them: their tokens, their times, how they ended."""

import itertools
from dataclasses import dataclass
from typing import Literal

from narrowcast.runtime.sampling import Histogram
from narrowcast.serving.requests import Finish, Piece

Ending = Finish | Literal["abort", "error"]

# Upper bounds, in seconds, as vLLM has them.
_LONG = 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
FIRST_TOKEN = 0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, *_LONG, 160, 640, 2560
NEXT_TOKEN = 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, *_LONG
LATENCY = 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680


@dataclass
class Life:
    """When a request with a prompt of `num_read` tokens came, began to run, and said its first and its last piece.

    Seconds of one clock.
    """

    num_read: int
    came: float
    begun: float = 0.0
    first: float | None = None
    last: float = 0.0
    num_said: int = 0  # tokens


class Figures:
    """Figures of all requests so far, which have `max_len` tokens at most. Times: histograms of seconds."""

    def __init__(self, *, max_len: int) -> None:
        self.num_refused = self.num_read = self.num_said = 0  # bodies; tokens of prompts and of answers
        self.endings: dict[Ending, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.first_token, self.next_token = Histogram(FIRST_TOKEN), Histogram(NEXT_TOKEN)
        self.whole, self.queue, self.prefill, self.decode = (Histogram(LATENCY) for _ in range(4))
        lengths = _one_two_five(max_len)
        self.prompt_tokens, self.answer_tokens = Histogram(lengths), Histogram(lengths)

    def hear(self, life: Life, piece: Piece, now: float) -> None:
        """Count a piece of an answer that is said now."""
        num_tokens = len(piece.tokens)
        if life.first is None:
            life.first = now
            self.num_read += life.num_read
            if num_tokens:
                self.first_token.add(now - life.came)
        elif num_tokens:
            self.next_token.add(now - life.last)
        life.last = now
        life.num_said += num_tokens
        self.num_said += num_tokens
        if piece.finish is not None:
            self._end(life, piece.finish, life.first)

    def give_up(self, ending: Literal["abort", "error"], number: int) -> None:
        """Count the end of requests that are not answered."""
        self.endings[ending] += number

    def _end(self, life: Life, finish: Finish, first: float) -> None:
        self.endings[finish] += 1
        self.whole.add(life.last - life.came)
        self.queue.add(life.begun - life.came)
        self.prefill.add(first - life.begun)
        self.decode.add(life.last - first)
        self.prompt_tokens.add(life.num_read)
        self.answer_tokens.add(life.num_said)


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, ..., no larger than that."""
    steps = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    return tuple(map(float, itertools.takewhile(lambda step: step <= most, steps)))
