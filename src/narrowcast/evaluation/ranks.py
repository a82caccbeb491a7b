"""Evaluations on real ranks, each in its own process with its part of the model: started here, or by torchrun."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from narrowcast.attaching import Handle
from narrowcast.engines import Dtype, Replicated, Weights, check_length, load_engine
from narrowcast.engines.parts import load_part
from narrowcast.engines.replication import affordable
from narrowcast.evaluation.continuations import GREEDY, Sampling, continuations
from narrowcast.evaluation.evaluation import NUM_SHOWN, Continued, Evaluation, beginning, conditions
from narrowcast.evaluation.reference import Reference
from narrowcast.evaluation.scoring import at_work, scored, standing_by
from narrowcast.evaluation.tasks import AnsweredTasks, TaskSet, answer
from narrowcast.launch import is_first_rank, run
from narrowcast.plan import Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.plan.split import Split
from narrowcast.progress import told
from narrowcast.runtime.prompts import Chunks
from narrowcast.runtime.reports import Report
from narrowcast.scores import Score
from narrowcast.transport import DEFAULT_TIMEOUT_S, Transport, transports_of


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of ranks that share the model of a folder or hub name, under each of `plans` in turn.

    They score `batches` (ids [B, T]) and answer `tasks`, both beside the uncompressed model, then continue `prompts`
    (ids [1, T]), but for the plans that are to be `silent`. `dtype`, `weights`, `replicated`: as `load` has
    them, the last one "auto" for what memory allows and the link pays for. `timeout_s`: how long they wait for one of
    them before it counts as lost.
    """

    model: str
    plans: Sequence[Path]
    algorithm: str = "auto"
    transport: str = "auto"
    feedback: bool = True
    prompt_chunks: Chunks = "auto"
    replicated: Replicated | Literal["auto"] = "none"
    dtype: Dtype = "auto"
    weights: Weights = "stored"
    timeout_s: float = DEFAULT_TIMEOUT_S
    batches: Sequence[Tensor] = ()
    tasks: TaskSet | None = None
    prompts: Sequence[Tensor] = ()
    max_new_tokens: int = 0
    sampling: Sampling = GREEDY
    silent: Collection[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one plan on the first rank. `report`: of scoring, or, without batches, of continuing prompts.

    `uncompressed`: what the uncompressed model adds to the prompts, where it is there to score against.
    """

    report: Report
    reference: Literal["whole", "split"] | None = None
    score: Score | None = None
    tasks: AnsweredTasks | None = None
    replicated: Replicated = "none"
    continuations: list[list[int]] = field(default_factory=list)
    uncompressed: list[list[int]] = field(default_factory=list)


def run_on_ranks(job: Job, split: Split) -> list[Outcome]:
    """One outcome a plan. Under torchrun, ranks but the first know their reports and continuations alone.

    Plans for another model, or for ranks that there cannot be, are refused before any rank is started.
    """
    engine = load_engine()
    skeleton = engine.skeleton(job.model)
    described = engine.fingerprint(skeleton)
    longest = max((prompt.shape[1] for prompt in job.prompts), default=0)
    check_length("prompt and new tokens", skeleton, longest + job.max_new_tokens)
    for path in job.plans:
        plan = Plan.load(path)
        plan.check_real()
        plan.check(described, split)
    return run(_on_rank, split.world_size, job, split, timeout_s=job.timeout_s)[0]


def evaluate_on_ranks(
    model: str,
    path: Path,
    batches: Sequence[Tensor],
    *,
    algorithm: str = "auto",
    feedback: bool = True,
    prompt_chunks: Chunks = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "stored",
    tasks: TaskSet | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Evaluation | None:
    """Evaluate the plan in `path` on real ranks, as `evaluate` does on virtual ones of the same model.

    None on ranks but the first under torchrun.
    """
    plan, prompt = Plan.load(path), beginning(batches)
    job = Job(
        model=model,
        plans=[path],
        algorithm=algorithm,
        feedback=feedback,
        prompt_chunks=prompt_chunks,
        dtype=dtype,
        weights=weights,
        timeout_s=timeout_s,
        batches=batches,
        tasks=tasks,
        prompts=[prompt],
        max_new_tokens=NUM_SHOWN,
    )
    (outcome,) = run_on_ranks(job, plan.split)
    if not is_first_rank():
        return None
    assert outcome.score is not None and outcome.reference is not None, "the first rank scores batches"
    return Evaluation(
        plan=plan,
        conditions=conditions(plan, batches, algorithm),
        reference=outcome.reference,
        real=True,
        feedback=feedback,
        score=outcome.score,
        report=outcome.report,
        continued=Continued(
            prompt=prompt[0].tolist(), uncompressed=outcome.uncompressed[0], coded=outcome.continuations[0]
        ),
        tasks=outcome.tasks,
    )


def _on_rank(job: Job, split: Split) -> list[Outcome]:
    engine, plans = load_engine(), [Plan.load(path) for path in job.plans]
    asked = job.replicated
    kept = affordable(engine, job.model, plans, dtype=job.dtype, weights=job.weights) if asked == "auto" else asked
    model = load_part(engine, job.model, split=split, replicated=kept, dtype=job.dtype, weights=job.weights)
    if job.batches:  # scores are of the codecs, whatever sums a tuned plan would leave uncoded
        plans = [replace(plan, decisions=Decisions()) for plan in plans]
    names = "algorithm", "transport", "feedback", "prompt_chunks"
    options = {name: getattr(job, name) for name in names}
    with standing_by(model, plans, **options) as handles:
        outcomes = _compared(job, model, handles) if job.batches else []
        said = [
            [] if path in job.silent else _said(job, model, handle)
            for path, handle in zip(job.plans, handles, strict=True)
        ]
        outcomes = outcomes or [Outcome(report=_report(model, handle)) for handle in handles]
    return [replace(outcome, continuations=ids, replicated=kept) for outcome, ids in zip(outcomes, said, strict=True)]


def _compared(job: Job, model: nn.Module, handles: Sequence[Handle]) -> list[Outcome]:
    """Scores and tasks, beside the uncompressed model."""
    reference = Reference(job.model, model, job.dtype, job.weights)
    batches = told(job.batches, "scoring")
    scores: Sequence[Score | None] = scored(model, handles, batches, reference.log_probs(job.batches))
    said = reference.ask(lambda whole: continuations(whole, job.prompts, job.max_new_tokens)) if job.prompts else []
    outcomes = [
        Outcome(report=_report(model, handle), reference=reference.kind, score=score, uncompressed=said or [])
        for handle, score in zip(handles, scores or [None] * len(handles), strict=True)
    ]
    if (tasks := job.tasks) is None:
        return outcomes
    tokenizer = load_engine().load_tokenizer(job.model)
    plain = reference.ask(lambda whole: answer(whole, tokenizer, tasks))
    for place, handle in enumerate(handles):
        with at_work(handle):
            coded = answer(model, tokenizer, tasks)
        if plain is not None:
            outcomes[place] = replace(outcomes[place], tasks=AnsweredTasks(tasks, plain, coded))
    return outcomes


def _said(job: Job, model: nn.Module, handle: Handle) -> list[list[int]]:
    with at_work(handle):
        return continuations(model, job.prompts, job.max_new_tokens, job.sampling) if job.prompts else []


def _report(model: nn.Module, handle: Handle) -> Report:
    """The report of the first rank of every stage, and clipping on all ranks, as the simulation counts it."""
    tp, pp = transports_of(load_engine().groups(model))
    report = handle.report()
    if tp is not None:
        ranks = _shared(tp, report)
        sites = {
            name: site.counting([each.sites[name] for each in ranks if name in each.sites])
            for name, site in ranks[0].sites.items()
        }
        report = replace(report, sites=sites)
    if pp is not None:
        sites = {}
        for stage in _shared(pp, report):
            sites |= {name: sites[name] + site if name in sites else site for name, site in stage.sites.items()}
        report = replace(report, sites=sites)
    return report


def _shared(ranks: Transport, report: Report) -> list[Report]:
    texts = ranks.share(json.dumps(report.to_json()), "adding up reports")
    return [Report.from_json(json.loads(text)) for text in texts]
