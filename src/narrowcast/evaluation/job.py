"""What `demo`, `evaluate` and `generate` do with a model and its plans: score text, continue prompts, count bytes."""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.attach import Handle, attach
from narrowcast.engines import device_of, load_engine
from narrowcast.evaluation.task_run import Answers, answers
from narrowcast.evaluation.tasks import TaskSet
from narrowcast.launch import is_first_rank, run
from narrowcast.plan import Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.plan.split import Split
from narrowcast.runtime.counters import Report
from narrowcast.scores import Score, compare, log_probs
from narrowcast.transport import DEFAULT_TIMEOUT_S, transports_of

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The uncompressed model's log-probabilities [B, T, V] of the first `num_batches`, read one by one from files."""

    folder: Path
    num_batches: int

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.from_numpy(np.load(self.folder / f"{index}.npy")) for index in range(self.num_batches))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Score `batches` (ids [B, T]) against the reference, answer `tasks`, then continue `prompts` (ids [1, T])."""

    model: str
    plans: Sequence[Path]
    algorithm: str = "auto"
    transport: str = "auto"
    timeout_s: float = DEFAULT_TIMEOUT_S
    batches: Sequence[Tensor] = ()
    reference: Reference | None = None
    tasks: TaskSet | None = None
    prompts: Sequence[Tensor] = ()
    max_new_tokens: int = 0
    replicate_vocabulary: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one plan: scores and bytes from scoring (or, without batches, bytes from generating), continuations' ids."""

    score: Score | None
    report: Report
    continuations: list[list[int]] = field(default_factory=list)
    answers: Answers = field(default_factory=dict)


def run_on_ranks(job: Job, split: Split) -> list[Outcome]:
    """One outcome a plan, from rank 0 of processes that hold a part of the model each."""
    return run(_on_rank, split.world_size, job, split, timeout_s=job.timeout_s)[0]


def run_simulated(job: Job, model: nn.Module) -> list[Outcome]:
    """The same from a whole model in this process."""
    return _outcomes(job, model, simulate=True)


@contextmanager
def reference_of(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[Reference]:
    """What the uncompressed `model` says to each batch, in temporary files, kept as long as the context."""
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as folder:
        for index, ids in enumerate(tracked(batches, "reference")):
            np.save(f"{folder}/{index}.npy", log_probs(model, ids).numpy())
        yield Reference(Path(folder), len(batches))


def _on_rank(job: Job, split: Split) -> list[Outcome]:
    return _outcomes(
        job, load_engine().load(job.model, split=split, replicate_vocabulary=job.replicate_vocabulary), simulate=False
    )


def _outcomes(job: Job, model: nn.Module, *, simulate: bool) -> list[Outcome]:
    outcomes = []
    for path in job.plans:
        plan = Plan.load(path)
        if job.batches:  # scores are of the codecs, whatever sums a tuned plan would leave uncoded
            plan = replace(plan, decisions=Decisions())
        with attach(
            model,
            plan,
            simulate=simulate,
            algorithm=job.algorithm,
            transport=job.transport,
            timeout_s=job.timeout_s,
        ) as handle:
            score, of_scoring = (_score(job, model), _report(model, handle)) if job.batches else (None, None)
            answered = answers(job.model, model, job.tasks)
            continuations = _continue(model, job.prompts, job.max_new_tokens) if job.prompts else []
            report = of_scoring or _report(model, handle)
            outcomes.append(Outcome(score=score, report=report, continuations=continuations, answers=answered))
    return outcomes


def _report(model: nn.Module, handle: Handle) -> Report:
    """What the first rank of every stage has sent, and clipping on all ranks, as the simulation counts it."""
    report = handle.report()
    tp, pp = transports_of(load_engine().groups(model))
    for transport in (tp, pp):
        if transport is None:
            continue
        texts = transport.share(json.dumps(report.to_json()), "adding up reports")
        reports = [Report.from_json(json.loads(text)) for text in texts]
        if transport is tp:
            sites = {
                name: site.counting([each.sites[name] for each in reports if name in each.sites])
                for name, site in reports[0].sites.items()
            }
        else:
            sites = {}
            for stage in reports:
                sites |= {name: sites[name] + site if name in sites else site for name, site in stage.sites.items()}
        report = Report(sites=sites)
    return report


def _score(job: Job, model: nn.Module) -> Score | None:
    found = (log_probs(model, ids) for ids in tracked(job.batches, "scoring"))
    if not is_first_rank():
        for _ in found:
            pass
        return None
    assert job.reference is not None, "whoever passes batches passes the reference"
    return compare(job.reference, found, job.batches)


@torch.no_grad()
def _continue(model: nn.Module, prompts: Sequence[Tensor], max_new_tokens: int) -> list[list[int]]:
    """Ids of greedy continuations, up to the end of text, of all prompts in one batch, padded on the left."""
    if len(prompts) > 1 and load_engine().split_of(model).pp_size > 1:  # no stage but the first knows of padding
        return [ids for prompt in prompts for ids in _continue(model, [prompt], max_new_tokens)]
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([functional.pad(torch.ones_like(prompt), (width - prompt.shape[1], 0)) for prompt in prompts])
    device = device_of(model)
    generated = model.generate(  # type: ignore[operator]
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,  # masked wherever it stands
    )
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {ends} if isinstance(ends, int) else set(ends or ())  # type: ignore[arg-type]
    return [list(itertools.takewhile(lambda id: id not in ends, row)) for row in generated[:, width:].tolist()]


def tracked(steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The steps, under a bar where somebody watches."""
    console = Console(stderr=True)
    hidden = not (is_first_rank() and console.is_terminal)
    return iter(track(steps, what, total=total, console=console, transient=True, disable=hidden))
