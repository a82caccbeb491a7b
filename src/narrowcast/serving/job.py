"""The settings of a server, and the ranks that they ask for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from narrowcast.engines import Dtype, Replicated, Weights, check_length, load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.runtime.sampling import EVERY
from narrowcast.transport import DEFAULT_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class Job:
    """The serving of the model in a folder or of a hub name, over the ranks of `plan`, or `tp_size` without one.

    `host`: an address of this machine, or unix:PATH. `name`: the model's, for clients. `max_len`: tokens of a request,
    prompt and answer, at most; None for the model's context, or what there is room for. `cache_tokens`: room for those
    of all requests that run. `sample_every`: as of `attach`. What else there is, as `evaluation.ranks.Job` has it.
    """

    model: str
    plan: Path | None = None
    tp_size: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str | None = None
    max_len: int | None = None
    max_running: int = 16
    max_waiting: int = 64
    cache_tokens: int = 16384
    transport: str = "auto"
    feedback: bool = True
    sample_every: int = EVERY
    replicated: Replicated | Literal["auto"] = "auto"
    dtype: Dtype = "auto"
    weights: Weights = "stored"
    timeout_s: float = DEFAULT_TIMEOUT_S


def split_of(job: Job) -> Split:
    """The ranks that serve it; InvalidInputError for what cannot be served, before any of them is started."""
    skeleton = load_engine().skeleton(job.model)
    if job.max_len is not None:
        check_length("--max-len", skeleton, job.max_len)
        if job.max_len > job.cache_tokens:
            found, remedy = job.max_len, "Pass a larger --cache-tokens."
            raise InvalidInputError(
                "--max-len", expected=f"{job.cache_tokens} at most, as --cache-tokens", found=found, remedy=remedy
            )
    if job.plan is None:
        split = Split(tp_size=job.tp_size or 1)
        if obstacle := load_engine().obstacle(skeleton, split):
            raise InvalidInputError(
                "-tp", expected="ranks that can share this model", found=obstacle, remedy="Choose another number."
            )
        return split
    plan = Plan.load(job.plan)
    plan.check_real()
    plan.check(load_engine().fingerprint(skeleton), plan.split)
    if job.tp_size not in (None, plan.tp_size):
        raise InvalidInputError(
            "-tp", expected=f"{plan.tp_size}, as the plan has it", found=job.tp_size, remedy="Leave it out."
        )
    if plan.split.pp_size > 1:
        raise InvalidInputError(
            "plan",
            expected="one without pipeline stages, which continuous batches do not know",
            found=f"one for {plan.split}",
            remedy="Calibrate for -pp 1, or continue prompts with narrowcast generate.",
        )
    return plan.split


def served_name(model: str) -> str:
    """The name of a model for its clients: a folder's or a file's own, or that on the hub."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
