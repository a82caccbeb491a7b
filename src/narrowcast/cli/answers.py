"""Answers as they are said: one prompt's text comes token by token, several prompts' texts in the end."""

import time
from collections.abc import Sequence
from typing import Any

import typer

from narrowcast.evaluation.continuations import Said

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a tokenizer shows a part of a character


class Answers:
    """Answers to each of `prompts`: on stdout, and how fast they come."""

    def __init__(self, tokenizer: Any, prompts: Sequence[str]) -> None:
        self._tokenizer, self._prompts = tokenizer, prompts
        self.ids: list[list[int]] = [[] for _ in prompts]
        self._num_printed = 0  # characters of the only answer
        self._begun_s = self._last_s = 0.0
        self._num_rest = 0  # tokens after the first ones
        self.prompt_s = self.rest_s = 0.0

    def hear(self, said: Said) -> None:
        """Takes the next tokens of some prompts; without any, these prompts begin to be read."""
        now_s = time.perf_counter()
        for place, id in said.ids.items():
            self.ids[place].append(id)
        if not said.ids:
            self._begun_s = self._last_s = now_s
        elif self._last_s == self._begun_s:
            self.prompt_s += now_s - self._begun_s
        else:
            self.rest_s += now_s - self._last_s
            self._num_rest += len(said.ids)
        self._last_s = now_s
        if len(self._prompts) == 1:
            self._print_more()

    def close(self) -> None:
        """Prints what is not printed yet, after an error or Ctrl-C too."""
        if not any(self.ids):
            return
        if len(self._prompts) == 1:
            self._print_more(last=True)
            typer.echo()
            return
        for place, prompt in enumerate(self._prompts):
            typer.echo(f"==> {' '.join(prompt.split())} <==\n{self.text(place)}\n")

    def text(self, place: int) -> str:
        """The answer to a prompt so far."""
        return str(self._tokenizer.decode(self.ids[place], skip_special_tokens=True))

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first ones, of all prompts; None for no such tokens."""
        return self._num_rest / self.rest_s if self.rest_s else None

    def speed(self) -> str:
        """Seconds to the first tokens, and the rate of the others."""
        number = sum(map(len, self.ids))
        after = "" if self.tokens_per_s is None else f", then {self.tokens_per_s:.1f} tokens a second"
        return f"{number} tokens: the first after {self.prompt_s:.2f} s{after}"

    def to_json(self) -> dict[str, Any]:
        """Texts and figures as JSON values."""
        said = [
            {"prompt": prompt, "text": self.text(place), "tokens": self.ids[place]}
            for place, prompt in enumerate(self._prompts)
        ]
        return {"answers": said, "prompt_s": self.prompt_s, "rest_s": self.rest_s, "tokens_per_s": self.tokens_per_s}

    def _print_more(self, *, last: bool = False) -> None:
        text = self.text(0)
        if last or not text.endswith(UNFINISHED):
            typer.echo(text[self._num_printed :], nl=False)
            self._num_printed = len(text)
