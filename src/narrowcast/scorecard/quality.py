"""Texts scored by a server: the log-probability that its model gives to each, by `logprobs` and `echo`."""

from collections.abc import Sequence

from narrowcast.errors import InvalidInputError
from narrowcast.progress import told
from narrowcast.scorecard.rounds import together
from narrowcast.scorecard.sentences import sentences, text
from narrowcast.scores import Items
from narrowcast.serving.remote import AnswerError, Api

PROBE_CHARACTERS = 600
NUM_WRITTEN, WRITTEN_TOKENS = 32, 240
LEAST_CHARACTERS = 100  # of a text that says anything


def written_by(api: Api, model: str, limit: int, concurrency: int) -> tuple[str, ...]:
    """Texts that the model writes, by seed, at temperature 1; `limit` at most, so many at once.

    On such text NLL grows by the KL divergence from the model that wrote it, however another one is coded.
    InvalidInputError for less than two.
    """

    def write(seed: int) -> str:
        begun = next(sentences(f"text {seed}"))
        asked = {"model": model, "prompt": begun, "max_tokens": WRITTEN_TOKENS, "temperature": 1, "seed": seed}
        return begun + str(api.json("/v1/completions", asked)["choices"][0]["text"])

    found = together(write, range(min(limit, NUM_WRITTEN)), concurrency, doing="having texts written")
    texts = tuple(sorted(each for each in found if len(each) >= LEAST_CHARACTERS))
    if len(texts) < 2:
        raise InvalidInputError(
            api.url,
            expected="a model that writes texts to score",
            found=f"{len(texts)}",
            remedy="Pass one with --text.",
        )
    return texts


def scored(api: Api, model: str, texts: Sequence[str]) -> Items:
    """The negative log-likelihood a token of each text, in nats; AnswerError where the server does not tell it."""
    values, weights = [], []
    for each in told(texts, "scoring texts"):
        body = {"model": model, "prompt": each, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        answer = api.json("/v1/completions", body)
        try:
            own = answer["choices"][0]["logprobs"]["token_logprobs"][1 : answer["usage"]["prompt_tokens"]]
            values.append(-sum(own) / len(own))
        except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
            raise AnswerError(f"{api.url}: no log-probabilities of the prompt, which were asked for", 200) from error
        weights.append(len(own))
    return Items(values=tuple(values), weights=tuple(weights))


def characters_per_token(api: Api, model: str) -> float:
    """Of text that is the same for every server: it tells the lengths of prompts, and tokenizers apart."""
    probe = text("probe", PROBE_CHARACTERS)
    answer = api.json("/v1/completions", {"model": model, "prompt": probe, "max_tokens": 1, "temperature": 0})
    try:
        return len(probe) / int(answer["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidInputError(
            api.url, expected="usage in each answer", found="none", remedy="Ask a server that counts tokens."
        ) from error
