"""One request's answer as it grows: the next token chosen, its text settled, its end found."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from narrowcast.serving.choosing import Chooser, scored
from narrowcast.serving.requests import Finish, Piece, Request, Token
from narrowcast.serving.text import Text

SCORED_AT_A_TIME = 256  # tokens of a prompt: for so long others wait, and so many logits are in memory


class Answer:
    """The answer to `request`, by the logits that the model gives for it. `ends`: tokens that end any text."""

    def __init__(self, request: Request, tokenizer: Any, ends: Collection[int]) -> None:
        self._request, self._ends = request, () if request.ignore_eos else ends
        self._chooser = Chooser(request)
        self._text = Text(tokenizer, request.prompt, request.stop)
        self._num_scored = 0  # tokens of the prompt that the model has read to score them
        self._scores = [Token(request.prompt[0])]
        self.ids = [*request.prompt]  # the prompt and the answer so far

    def unscored(self) -> tuple[int, ...]:
        """The tokens of the prompt to score next; none where that is done, or was not asked for."""
        start = self._num_scored
        return self._request.prompt[start : start + SCORED_AT_A_TIME] if self._request.scored else ()

    @property
    def begins(self) -> bool:
        """True before any token is scored."""
        return self._num_scored == 0

    def score(self, logits_TV: Tensor) -> Piece | None:
        """Take the logits after these tokens; with the last ones, the first piece of the answer."""
        start = self._num_scored + 1
        self._num_scored += len(logits_TV)
        following = self._request.prompt[start : self._num_scored + 1]
        self._scores += scored(logits_TV[: len(following)], following, self._request.num_top or 0)
        if self.unscored():
            return None
        if not self._request.max_new_tokens:
            return Piece(prompt=self._scores, finish="length")
        first = self.take(logits_TV[-1])
        return Piece(text=first.text, tokens=first.tokens, prompt=self._scores, finish=first.finish)

    def take(self, logits_V: Tensor) -> Piece:
        """Choose the next token by the logits after the last one."""
        token = self._chooser.choose(logits_V)
        self.ids.append(token.id)
        if token.id in self._ends:
            return Piece(text=self._text.close(), tokens=[token], finish="stop")
        text, finish = self._text.add(token.id), self._finish()
        if finish == "length":
            text += self._text.close()
            finish = self._finish()
        return Piece(text=text, tokens=[token], finish=finish)

    def _finish(self) -> Finish | None:
        if self._text.stopped:
            return "stop"
        num_tokens = len(self.ids) - len(self._request.prompt)
        return "length" if num_tokens >= self._request.max_new_tokens else None
