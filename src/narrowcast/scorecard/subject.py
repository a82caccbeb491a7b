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
    """A server and its first model; `about`: what else is known of it, by name, as far as another one may differ."""

    api: Api
    model: str
    about: dict[str, str]


def at(url: str, scenario: Scenario, *, api_key: str | None = None) -> Subject:
    """The server at `url`; InvalidInputError where there is none, or where ranks would have to be on a link."""
    if scenario.link is not None:
        raise InvalidInputError(
            f"scenario {scenario.name}",
            expected="a MODEL, whose ranks are started on the link",
            found="the URL of ranks that run",
            remedy="Pass the model's folder, or a scenario without a link.",
        )
    return _subject(Api(url, api_key=api_key, timeout_s=SILENT_S), {HARDWARE: _hardware_of(url)})


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
            yield _subject(Api(serving.url, timeout_s=SILENT_S), _about_job(job))


def _subject(api: Api, about: dict[str, str]) -> Subject:
    listed = api.json("/v1/models")
    try:
        first = listed["data"][0]
        model, owner = str(first["id"]), str(first.get("owned_by", "unknown"))
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
    return Subject(api, model, {**told, **about})


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
