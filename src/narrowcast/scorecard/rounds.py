"""A round of requests, so many at once, and how fast they were answered."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from narrowcast.errors import NarrowcastError
from narrowcast.progress import Progress, tell
from narrowcast.scorecard.figures import FIRST, NEXT, RATE
from narrowcast.serving.remote import Api

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """An answer of `num_tokens`: seconds from the request to the first of them, and from there to the last."""

    first_s: float
    rest_s: float
    num_tokens: int


def speed_of_round(api: Api, model: str, prompts: Sequence[str], new_tokens: int, concurrency: int) -> dict[str, float]:
    """Medians over its requests, and tokens a second of all of them, by figure."""
    begun = time.perf_counter()
    answers = together(lambda prompt: answered(api, model, prompt, new_tokens), prompts, concurrency)
    passed_s = time.perf_counter() - begun
    return {
        FIRST: 1e3 * statistics.median(each.first_s for each in answers),
        NEXT: 1e3 * statistics.median(each.rest_s / (each.num_tokens - 1) for each in answers),
        RATE: sum(each.num_tokens for each in answers) / passed_s,
    }


def answered(api: Api, model: str, prompt: str, new_tokens: int) -> Answered:
    """The answer to one prompt, of which every token is as likely as any other to be the last."""
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    begun, first, last, num_tokens = time.perf_counter(), 0.0, 0.0, 0
    with api.events("/v1/completions", {**body, "stream_options": {"include_usage": True}}) as chunks:
        for chunk in chunks:
            if chunk["choices"]:
                last = time.perf_counter()
                first = first or last
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
    if num_tokens != new_tokens:
        raise NarrowcastError(
            f"{api.url}: expected an answer of {new_tokens} tokens, as max_tokens and ignore_eos ask for, found "
            f"{num_tokens}: this server cannot be measured so"
        )
    return Answered(first - begun, last - first, num_tokens)


def together(do: Callable[[S], T], parts: Sequence[S], concurrency: int, *, doing: str | None = None) -> list[T]:
    """The results of all parts, so many of which are done at once; raises what the first to fail raised.

    Nobody waits for the others then: their threads end when they notice. `doing`: in words, for who hears of progress.
    """
    left, done = deque(parts), SimpleQueue[T | Exception]()

    def work() -> None:
        while True:
            try:
                part = left.popleft()
            except IndexError:
                return
            try:
                done.put(do(part))
            except Exception as error:
                done.put(error)

    for _ in range(concurrency):
        threading.Thread(target=work, daemon=True).start()
    found: list[T] = []
    try:
        while len(found) < len(parts):
            if doing is not None:
                tell(Progress(doing, len(found), len(parts)))
            if isinstance(result := done.get(), Exception):
                raise result
            found.append(result)
    finally:
        left.clear()
    return found


def by_figure(rounds: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """The figures of all rounds, by name; not every round has all."""
    names = dict.fromkeys(name for each in rounds for name in each)
    return {name: tuple(each[name] for each in rounds if name in each) for name in names}
