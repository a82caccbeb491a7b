"""Evaluating a plan on a whole model, all ranks simulated in this process."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.continuations import continuations
from narrowcast.evaluation.evaluation import NUM_SHOWN, Continued, Evaluation, beginning, conditions
from narrowcast.evaluation.scoring import at_work, scored, standing_by
from narrowcast.evaluation.sites import SiteError, site_errors
from narrowcast.evaluation.tasks import AnsweredTasks, TaskSet, answer
from narrowcast.plan import Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.progress import told
from narrowcast.runtime.prompts import Chunks
from narrowcast.scores import log_probs

NUM_SITE_BATCHES = 4


def evaluate(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Tensor],
    *,
    algorithm: str = "auto",
    feedback: bool = True,
    prompt_chunks: Chunks = "auto",
    reference: Sequence[Tensor] | None = None,
    sites: bool = False,
    tasks: TaskSet | None = None,
    tokenizer: Any = None,
) -> Evaluation:
    """Score `plan` on text: token ids [B, T], each row a sequence of two tokens or more.

    Each batch goes through `model`, whole and uncompressed, then through the same with the plan attached; nothing but
    figures is kept of it. `reference`: log-probabilities [B, T, V] of the uncompressed model for each batch, where they
    are at hand. `feedback`, `prompt_chunks`: as `attach` has them. Of a tuned plan, too, every sum is coded: what it
    leaves uncoded for speed makes answers only better.
    `sites`: measure too what each site alone adds to the KL divergence, on the first batches.
    `tasks`: let lm-evaluation-harness ask both models, too, which takes the `tokenizer`.
    Raises InvalidInputError for what `attach` refuses, and for no batches.
    """
    if not batches:
        raise InvalidInputError("batches", expected="one or more", found="none", remedy="Pass token ids [B, T].")

    def uncompressed(num_batches: int) -> Iterable[Tensor]:
        some = batches[:num_batches]
        return (log_probs(model, ids) for ids in some) if reference is None else reference[:num_batches]

    coded, prompts = replace(plan, decisions=Decisions()), [beginning(batches)]
    options: dict[str, Any] = {"algorithm": algorithm, "feedback": feedback, "prompt_chunks": prompt_chunks}
    with standing_by(model, [coded], simulate=True, **options) as (handle,):
        (score,) = scored(model, [handle], told(batches, "scoring"), uncompressed(len(batches)))
        report = handle.report()
        before = continuations(model, prompts, NUM_SHOWN)
        with at_work(handle):
            after = continuations(model, prompts, NUM_SHOWN)
        answered = None
        if tasks is not None:
            plain = answer(model, tokenizer, tasks)
            with at_work(handle):
                answered = AnsweredTasks(tasks, plain, answer(model, tokenizer, tasks))
    errors: Sequence[SiteError] = ()
    if sites:
        first = batches[:NUM_SITE_BATCHES]
        seen = told(first, "scoring sites")
        errors = site_errors(model, coded, seen, uncompressed(len(first)), **options)
    return Evaluation(
        plan=plan,
        conditions=conditions(plan, batches, algorithm),
        reference="whole",
        real=False,
        feedback=feedback,
        score=score,
        report=report,
        continued=Continued(prompt=prompts[0][0].tolist(), uncompressed=before[0], coded=after[0]),
        sites=errors,
        tasks=answered,
    )
