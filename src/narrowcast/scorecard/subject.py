"""The server that is measured: one that runs, or one that is started for it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from narrowcast.errors import InvalidInputError
from narrowcast.files import versions
from narrowcast.launch import Link, under_torchrun
from narrowcast.perf.machine import gpus, machine
from narrowcast.plan import Plan
from narrowcast.scorecard.metrics import Metrics
from narrowcast.scorecard.scenario import Scenario
from narrowcast.serving import Job, served
from narrowcast.serving.listener import UNIX, bound
from narrowcast.serving.remote import AnswerError, Api

SILENT_S = 300.0  # after which a server will not answer any more
HARDWARE = "hardware"
TOLD = "narrowcast", "torch", "transformers", "python"  # versions


@dataclass(frozen=True)
class Subject:
    """A server and its first model; `about`: what else is known of it, by name, as far as another one may differ.

    `max_len`: tokens of a prompt and its answer, if the server tells.
    """

    api: Api
    model: str
    about: dict[str, str]
    max_len: int | None = None

    def check(self, scenario: Scenario) -> None:
        """InvalidInputError unless there is room for the longest prompt of `scenario` and its answer."""
        longest = max(scenario.prompt_tokens) + scenario.new_tokens
        if self.max_len is not None and longest > self.max_len:
            raise InvalidInputError(
                f"scenario {scenario.name}",
                expected=f"{self.max_len} tokens at most of prompt and answer, as {self.model} has room for",
                found=longest,
                remedy="Choose another scenario, or write one of shorter prompts.",
            )


def at(url: str, scenario: Scenario, *, api_key: str | None = None) -> Subject:
    """The server at `url`; InvalidInputError where there is none, or where ranks would have to be on a link."""
    if scenario.link is not None:
        raise InvalidInputError(
            f"scenario {scenario.name}",
            expected="a MODEL, whose ranks are started on the link",
            found="the URL of ranks that run",
            remedy="Pass the model's folder, or a scenario without a link.",
        )
    return _subject(Api(url, api_key=api_key, timeout_s=SILENT_S), scenario, {HARDWARE: _hardware_of(url)})


@contextmanager
def started(job: Job, scenario: Scenario) -> Iterator[Subject]:
    """A server of ours for `job`, with places for the requests of `scenario`, on its link if it has one.

    Raises as `serving.served` does.
    """
    if under_torchrun():
        raise InvalidInputError(
            "MODEL",
            expected="ranks that are started here",
            found="torchrun's",
            remedy="Start narrowcast serve by torchrun, and pass its URL.",
        )
    link = None if scenario.link is None else Link.parse(scenario.link)
    room = 2 * scenario.concurrency * (max(scenario.prompt_tokens) + scenario.new_tokens)
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as folder:
        asked = replace(
            job,
            host=f"{UNIX}{folder}/server",
            max_running=max(job.max_running, scenario.concurrency),
            cache_tokens=max(job.cache_tokens, room),
        )
        with served(asked, link) as serving:
            yield _subject(Api(serving.url, timeout_s=SILENT_S), scenario, _about_job(job))


def _subject(api: Api, scenario: Scenario, about: dict[str, str]) -> Subject:
    listed = api.json("/v1/models")
    try:
        first = listed["data"][0]
        model, owner, max_len = str(first["id"]), str(first.get("owned_by", "unknown")), first.get("max_model_len")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            api.url,
            expected="a model at /v1/models",
            found="none",
            remedy="Pass the address of a server of OpenAI's API.",
        ) from error
    told = {"server": " ".join(filter(None, (owner, _version(api))))}
    if (metrics := Metrics.of(api)) is not None:
        told |= metrics.about
    subject = Subject(api, model, {**told, **about}, max_len if isinstance(max_len, int) else None)
    subject.check(scenario)
    return subject


def _version(api: Api) -> str:
    """As vLLM tells it."""
    with suppress(AnswerError, InvalidInputError, KeyError, TypeError):
        return str(api.json("/version")["version"])
    return ""


def _about_job(job: Job) -> dict[str, str]:
    plan = None if job.plan is None else Plan.load(job.plan)
    return {
        "plan": "none" if plan is None else plan.fingerprint[:12],
        "ranks": str(plan.split.world_size if plan is not None else job.tp_size or 1),
        "dtype": job.dtype,
        "weights": job.weights,
        HARDWARE: _hardware(),
        **{name: version for name in TOLD if (version := versions()[name])},
    }


def _hardware() -> str:
    here = machine()
    return ", ".join([here["cpu"], f"{here['cores']} cores", *gpus()])


def _hardware_of(url: str) -> str:
    """This machine's, where the server is on it; otherwise all that is known of it is where it is."""
    host = urlsplit(url).hostname or ""
    try:
        bound(host, 0).close()
    except InvalidInputError:
        return f"that of {host}"
    return _hardware()
