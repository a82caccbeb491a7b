"""The bodies of requests. What is not supported is refused, and not ignored, unless it asks for nothing."""

import reprlib
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from narrowcast.serving.web.refused import RefusedError

MAX_N, MAX_TOP, MAX_STOPS, MAX_PROMPTS = 16, 20, 16, 256

# Values that ask for nothing, of parameters that other servers know.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}

TokenId = Annotated[int, Field(strict=True, ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = False


class Body(BaseModel):
    """Parameters that completions and chats have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS)] = []
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _simplified(cls, given: Any) -> Any:
        """Without what is null, and stop strings in a list."""
        if not isinstance(given, dict):
            return given
        body = {name: value for name, value in given.items() if value is not None}
        if isinstance(body.get("stop"), str):
            body["stop"] = [body["stop"]]
        return body

    @model_validator(mode="after")
    def _supported(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in WITHOUT_EFFECT or value in NEUTRAL.get(name, ()):
                continue
            similar = get_close_matches(name, type(self).model_fields, n=1, cutoff=0.8)
            remedy = f"is {similar[0]} meant?" if similar else "leave it out"
            raise ValueError(f"{name} is not supported by this server: {remedy}")
        return self


class CompletionBody(Body):
    """Of /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP)] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, texts or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat. What else an answer had, clients send back with it; it is not read."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


def refused_by(error: ValidationError) -> RefusedError:
    """The first thing that is wrong, in a sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    place, message = ".".join(map(str, first["loc"])), _said(first)
    match first["loc"]:  # where several kinds may be, of which it says that it is not the first
        case ("prompt", *_):
            place, message = "prompt", "expected a text, token ids, or a list of either"
        case ("messages", number, "content", *_):
            place, message = f"messages.{number}.content", "expected a text, or a list of parts of type text"
    return RefusedError(400, f"{place}: {message}" if place else message, param=str(first["loc"][0]) if place else None)


def _said(error: ErrorDetails) -> str:
    """In the words of all our errors."""
    if error["type"] == "missing":
        return "expected a value, found none"
    if error["type"] == "extra_forbidden":
        return "not supported by this server: leave it out"
    if error["type"] == "too_short":
        return "expected one at least, found none"
    before, should, expected = error["msg"].partition("Input should be ")
    if should and not before:
        expected = expected if error["type"] == "literal_error" else expected.partition(", ")[0]
        return f"expected {expected}, found {reprlib.repr(error['input'])}"
    return error["msg"].removeprefix("Value error, ")
