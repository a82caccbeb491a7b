"""A chat, turn by turn: with a server of OpenAI's API, or with a model in this process."""

from collections.abc import Callable
from typing import Protocol

import torch

from narrowcast.engines import Dtype, Weights, check_length, context_of, load_engine
from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.evaluation.continuations import Said, Sampling, continuations
from narrowcast.progress import heard_by
from narrowcast.serving.remote import Api
from narrowcast.serving.text import Text

Messages = list[dict[str, str]]
Say = Callable[[str], object]

UNLIMITED = 4096  # tokens of an answer, of a model without end


class Partner(Protocol):
    """Who answers."""

    def answer(self, messages: Messages, say: Say) -> None:
        """Say the next message, bit by bit; NarrowcastError where that is not possible."""
        ...


class Remote:
    """The first model of the server at `url`, with or without its /v1; InvalidInputError where there is none."""

    def __init__(self, url: str, *, api_key: str | None, sampling: Sampling) -> None:
        self._api = Api(url, api_key=api_key)
        found = self._api.json("/v1/models")
        self._settings = {"model": found["data"][0]["id"], "temperature": sampling.temperature, "seed": sampling.seed}

    def answer(self, messages: Messages, say: Say) -> None:
        with self._api.events("/v1/chat/completions", {**self._settings, "messages": messages}) as chunks:
            for chunk in chunks:
                for choice in chunk["choices"]:
                    say(choice["delta"].get("content") or "")


class Local:
    """A model of a folder or hub name, whole, in this process. InvalidInputError for one without a chat template."""

    def __init__(self, path: str, *, dtype: Dtype, weights: Weights, sampling: Sampling) -> None:
        engine = load_engine()
        self._tokenizer, self._sampling = engine.load_tokenizer(path), sampling
        if not self._tokenizer.chat_template:
            raise InvalidInputError(
                path, expected="a model with a chat template", found="none", remedy="Continue texts with generate."
            )
        self._model = engine.load(path, dtype=dtype, weights=weights)

    def answer(self, messages: Messages, say: Say) -> None:
        settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids: torch.Tensor = self._tokenizer.apply_chat_template(messages, **settings).input_ids
        check_length("messages and answer", self._model, ids.shape[1] + 1)
        text = Text(self._tokenizer, ids[0].tolist(), ())

        def hear(said: object) -> None:
            if isinstance(said, Said):
                say("".join(map(text.add, said.ids.values())))

        room = (context_of(self._model) or ids.shape[1] + UNLIMITED) - ids.shape[1]
        try:
            with heard_by(hear):
                continuations(self._model, [ids], room, self._sampling)
        finally:
            say(text.close())


def converse(partner: Partner, read: Callable[[], str], say: Say, warn: Say, *, system: str | None = None) -> bool:
    """Answer what `read` gives until it raises EOFError; KeyboardInterrupt ends an answer, which is kept as it is.

    True if everything was answered; `warn` hears of what was not, and why.
    """
    messages, all_answered = [] if system is None else [{"role": "system", "content": system}], True
    while (words := _read(read, say)) is not None:
        if not words.strip():
            continue
        messages.append({"role": "user", "content": words})
        said = _Told(say)
        try:
            partner.answer(messages, said.more)
        except KeyboardInterrupt:
            pass
        except NarrowcastError as error:
            warn(f"narrowcast: error: {error}\n")
            messages.pop()
            all_answered = False
            continue
        say("\n")
        messages.append({"role": "assistant", "content": said.text})
    return all_answered


class _Told:
    """An answer that is told as it grows."""

    def __init__(self, say: Say) -> None:
        self.text, self._say = "", say

    def more(self, text: str) -> None:
        self.text += text
        self._say(text)


def _read(read: Callable[[], str], say: Say) -> str | None:
    while True:
        try:
            return read()
        except KeyboardInterrupt:  # of a line, not of the chat
            say("\n")
        except EOFError:
            return None
