"""Answers in the shape of OpenAI's: completions and chats, whole or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from narrowcast.serving.requests import Piece, Request, Token
from narrowcast.serving.text import UNFINISHED
from narrowcast.serving.web.bodies import Body
from narrowcast.serving.web.model import Model

Json = dict[str, Any]


class Form(ABC):
    """The form of the answer to `body`, which asked for `requests`; `echo`: prompts come before answers."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: Model, body: Body, requests: Sequence[Request], *, echo: bool = False) -> None:
        self._model, self._body, self._requests, self._echo = model, body, requests, echo
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._num_said = 0  # tokens of answers
        self._begun: set[int] = set()

    @abstractmethod
    def beginning(self, index: int) -> Json | None:
        """A choice that goes before the first piece of a stream, if any."""

    @abstractmethod
    def choice(self, index: int, piece: Piece) -> Json:
        """A whole answer."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> Json:
        """The next piece of a stream."""

    def whole(self, heard: Sequence[Sequence[Piece]]) -> Json:
        """The answer, of whose every choice these are the pieces."""
        choices = [
            self.choice(index, _joined([self._received(index, piece) for piece in pieces]))
            for index, pieces in enumerate(heard)
        ]
        return {**self._about(self.kind), "choices": choices, "usage": self._usage()}

    async def chunks(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[Json]:
        """The answer bit by bit."""
        with_usage = bool(self._body.stream_options.include_usage)
        about = self._about(self.chunk_kind) | ({"usage": None} if with_usage else {})
        async for index, piece in pieces:
            for choice in self._choices(index, piece):
                yield {**about, "choices": [choice]}
        if with_usage:
            yield {**about, "choices": [], "usage": self._usage()}

    def _choices(self, index: int, piece: Piece) -> Iterator[Json]:
        if index not in self._begun and (beginning := self.beginning(index)) is not None:
            yield beginning
        piece = self._received(index, piece)
        if piece.text or piece.finish or self._requests[index].num_top is not None:
            yield self.delta(index, piece)

    def _received(self, index: int, piece: Piece) -> Piece:
        """The piece, counted; the first one behind what is echoed."""
        self._num_said += len(piece.tokens)
        first = index not in self._begun
        self._begun.add(index)
        if not (first and self._echo):
            return piece
        text = self._model.text(self._requests[index].prompt) + piece.text
        return replace(piece, text=text, tokens=[*piece.prompt, *piece.tokens])

    def _about(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _usage(self) -> Json:
        read = sum(len(request.prompt) for request in self._requests[:: self._body.n])  # each prompt once
        return {"prompt_tokens": read, "completion_tokens": self._num_said, "total_tokens": read + self._num_said}


class Completion(Form):
    """A text continued."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: Model, body: Body, requests: Sequence[Request], *, echo: bool = False) -> None:
        super().__init__(model, body, requests, echo=echo)
        self._offsets = [0] * len(requests)  # characters of the tokens so far

    def beginning(self, index: int) -> Json | None:
        return None

    def choice(self, index: int, piece: Piece) -> Json:
        logprobs = None if self._requests[index].num_top is None else self._logprobs(index, piece.tokens)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def delta(self, index: int, piece: Piece) -> Json:
        return self.choice(index, piece)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json:
        texts = [self._model.spelling.of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the one at this place, by their texts: of those with one text, the likeliest."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for id, logprob in [*token.top, (token.id, token.logprob)]:
            text = self._model.spelling.of(id)
            found[text] = max(logprob, found.get(text, logprob))
        return found


class Chat(Form):
    """The next message of a chat."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def beginning(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text}
        return {"index": index, "message": message, "logprobs": self._logprobs(piece), "finish_reason": piece.finish}

    def delta(self, index: int, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(piece), "finish_reason": piece.finish}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not any(token.logprob is not None for token in piece.tokens):
            return None
        content = [
            self._likely(token.id, token.logprob) | {"top_logprobs": [self._likely(*each) for each in token.top]}
            for token in piece.tokens
        ]
        return {"content": content, "refusal": None}

    def _likely(self, id: int, logprob: float | None) -> Json:
        text = self._model.spelling.of(id)
        whole = UNFINISHED not in text  # bytes of a part of a character are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        finish=pieces[-1].finish,
    )
