"""A served model as requests see it: its tokens, its templates, its limits."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from narrowcast.serving.requests import Request
from narrowcast.serving.text import Spelling, decoded
from narrowcast.serving.web.bodies import Body, ChatBody, CompletionBody
from narrowcast.serving.web.refused import RefusedError

T = TypeVar("T")

COMPLETION_TOKENS = 16  # where a completion does not say how many, as OpenAI has it


@dataclass(frozen=True)
class Model:
    """The model `name`, of whose `vocab_size` tokens `max_len` fit into a request with its answer."""

    name: str
    tokenizer: Any
    vocab_size: int
    max_len: int
    spelling: Spelling = field(init=False)
    _alone: ThreadPoolExecutor = field(init=False)  # encoding takes long, and tokenizers take one text at a time

    def __post_init__(self) -> None:
        object.__setattr__(self, "spelling", Spelling(self.tokenizer))
        object.__setattr__(self, "_alone", ThreadPoolExecutor(1, thread_name_prefix="tokenizer"))

    def check(self, body: Body) -> None:
        """RefusedError of a body for another model."""
        if body.model != self.name:
            message = f"model: expected {self.name!r}, the one that is served, found {body.model!r}"
            raise RefusedError(404, message, param="model", code="model_not_found")

    async def completions(self, body: CompletionBody) -> list[Request]:
        """The requests of a completion, `n` for each prompt; RefusedError of prompts that cannot be served."""
        prompts = [await self._ids(prompt) for prompt in body.prompts]
        scored = body.echo and (body.logprobs is not None or body.max_tokens == 0)
        if body.max_tokens == 0 and not body.echo:
            raise RefusedError(400, "max_tokens: expected 1 at least, or echo: true", param="max_tokens")
        asked = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return [each for ids in prompts for each in self._requests(body, ids, asked, body.logprobs, scored=scored)]

    async def chats(self, body: ChatBody) -> list[Request]:
        """The requests of a chat, `n` of them; RefusedError of one that cannot be served."""
        if not self.tokenizer.chat_template:
            raise RefusedError(400, "messages: this model has no chat template; ask /v1/completions", param="messages")
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        ids = await self._off_loop(lambda: self._templated(messages))
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if asked == 0:
            raise RefusedError(400, "max_tokens: expected 1 at least", param="max_tokens")
        asked = max(1, self.max_len - len(ids)) if asked is None else asked
        return self._requests(body, ids, asked, body.top_logprobs if body.logprobs else None)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a prompt."""
        return decoded(self.tokenizer, ids)

    def _requests(
        self, body: Body, ids: Sequence[int], max_new_tokens: int, num_top: int | None, *, scored: bool = False
    ) -> list[Request]:
        self._check_prompt(ids, max_new_tokens)
        return [
            Request(
                prompt=tuple(ids),
                max_new_tokens=max_new_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=None if body.seed is None else body.seed + index,
                stop=tuple(body.stop),
                num_top=num_top,
                scored=scored,
                ignore_eos=body.ignore_eos,
            )
            for index in range(body.n)
        ]

    def _check_prompt(self, ids: Sequence[int], max_new_tokens: int) -> None:
        if not ids:
            raise RefusedError(400, "prompt: expected one token at least, found none", param="prompt")
        if max(ids) >= self.vocab_size:
            message = f"prompt: expected token ids below {self.vocab_size}, found {max(ids)}"
            raise RefusedError(400, message, param="prompt")
        if len(ids) + max_new_tokens > self.max_len:
            message = (
                f"expected {self.max_len} tokens at most in prompt and answer, found {len(ids)} in the prompt and "
                f"{max_new_tokens} to be added: shorten one of them"
            )
            raise RefusedError(400, message, param="max_tokens", code="context_length_exceeded")

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return await self._off_loop(lambda: list(self.tokenizer(prompt).input_ids))

    def _templated(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program of the model's makers, with demands of its own
            raise RefusedError(
                400, f"messages: the model's template refuses them: {error}", param="messages"
            ) from error
        return list(found["input_ids"])

    async def _off_loop(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._alone, call)
