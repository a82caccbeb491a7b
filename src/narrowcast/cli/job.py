"""What `demo`, `evaluate` and `generate` do with a model and its plans: score text, continue prompts, count bytes."""

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

import narrowcast
from narrowcast import Plan
from narrowcast.cli.launch import is_first_rank, on_ranks
from narrowcast.decision import Decisions
from narrowcast.evaluate import Score, compare, log_probs
from narrowcast.integrations import Handle, device_of, load_engine, transports_of
from narrowcast.monitor import Report
from narrowcast.split import Split
from narrowcast.transport import DEFAULT_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class Job:
    """Score `batches` (ids [B, T]) against the reference's files, then continue `prompts` (ids [1, T]) greedily."""

    model: str
    plans: Sequence[Path]
    algorithm: str = "auto"
    transport: str = "auto"
    timeout_s: float = DEFAULT_TIMEOUT_S
    batches: Sequence[Tensor] = ()
    reference: Path | None = None
    prompts: Sequence[Tensor] = ()
    max_new_tokens: int = 0
    replicate_vocabulary: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one plan: scores and bytes from scoring (or, without batches, bytes from generating), continuations' ids."""

    score: Score | None
    report: Report
    continuations: list[list[int]] = field(default_factory=list)


def run_on_ranks(job: Job, split: Split) -> list[Outcome]:
    """One outcome a plan, from rank 0 of processes that hold a part of the model each."""
    return on_ranks(_on_rank, split.world_size, job.timeout_s, job, split)


def run_simulated(job: Job, model: nn.Module) -> list[Outcome]:
    """The same from a whole model in this process."""
    return _outcomes(job, model, simulate=True)


@contextmanager
def reference_of(model: nn.Module, batches: Sequence[Tensor]) -> Iterator[Path]:
    """A folder with the uncompressed model's log-probabilities for each batch, kept as long as the context."""
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as folder:
        for index, ids in enumerate(_track(batches, "reference")):
            np.save(f"{folder}/{index}.npy", log_probs(model, ids).numpy())
        yield Path(folder)


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
        with narrowcast.attach(
            model,
            plan,
            simulate=simulate,
            algorithm=job.algorithm,
            transport=job.transport,
            timeout_s=job.timeout_s,
        ) as handle:
            score, of_scoring = (_score(job, model), _report(model, handle)) if job.batches else (None, None)
            continuations = _continue(model, job.prompts, job.max_new_tokens) if job.prompts else []
            report = of_scoring or _report(model, handle)
            outcomes.append(Outcome(score=score, report=report, continuations=continuations))
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
        sites = dict(reports[0].sites)
        for stage in reports[1:] if transport is pp else []:
            sites |= {name: sites[name] + site if name in sites else site for name, site in stage.sites.items()}
        report = Report(
            sites=sites,
            num_saturated=sum(each.num_saturated for each in reports),
            num_non_finite=sum(each.num_non_finite for each in reports),
            num_guarded=sum(each.num_guarded for each in reports),
        )
    return report


def _score(job: Job, model: nn.Module) -> Score | None:
    found = (log_probs(model, ids) for ids in _track(job.batches, "scoring"))
    if not is_first_rank():
        for _ in found:
            pass
        return None
    assert job.reference is not None, "whoever passes batches passes the reference's files"
    files = [job.reference / f"{index}.npy" for index in range(len(job.batches))]
    return compare((torch.from_numpy(np.load(file)) for file in files), found, job.batches)


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


def _track(batches: Sequence[Tensor], what: str) -> Iterator[Tensor]:
    console = Console(stderr=True)
    hidden = not (is_first_rank() and console.is_terminal)
    return iter(track(batches, what, console=console, transient=True, disable=hidden))
