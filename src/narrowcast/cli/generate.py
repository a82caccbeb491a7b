"""`narrowcast generate`: prompts continued by a split model with a plan."""

from typing import Annotated

import typer

from narrowcast.cli import options
from narrowcast.cli.options import TEXT, option
from narrowcast.engines import Replicated, load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.ranks import Job, run_on_ranks
from narrowcast.launch import is_first_rank
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.runtime.counters import Report
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport

KEPT: dict[Replicated, str] = {
    "none": "",
    "embedding": "; embedding whole on every rank",
    "all": "; embedding and output layer whole on every rank",
}


def generate(
    model: options.ModelArgument,
    plan: options.PlanOption,
    prompt: Annotated[list[str], option(TEXT, "TEXT", "To continue; again and again for several.")],
    max_new_tokens: Annotated[int, option(TEXT, "N", "Tokens to add at most.", min=1)] = 64,
    transport: options.TransportOption = "auto",
    no_feedback: options.NoFeedback = False,
    prompt_chunks: options.PromptChunks = "auto",
    replicate: options.Replicate = "auto",
    dtype: options.DtypeOption = "auto",
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Continue prompts greedily on the ranks of a plan: started here, or those of torchrun."""
    check_transport(transport)
    loaded = Plan.load(plan)
    loaded.check_real()
    split = loaded.split
    tokenizer = load_engine().load_tokenizer(model)
    prompts = [tokenizer(each, return_tensors="pt").input_ids for each in prompt]
    if any(ids.shape[1] == 0 for ids in prompts):
        raise InvalidInputError("--prompt", expected="text", found="nothing", remedy="Pass at least a word.")
    job = Job(
        model=model,
        plans=[plan],
        transport=transport,
        feedback=not no_feedback,
        prompt_chunks=options.prompt_chunks(prompt_chunks),
        replicated=replicate,
        dtype=dtype,
        timeout_s=timeout,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
    )
    (outcome,) = run_on_ranks(job, split)
    if not is_first_rank():
        return
    for start, ids in zip(prompts, outcome.continuations, strict=True):
        typer.echo(tokenizer.decode([*start[0].tolist(), *ids], skip_special_tokens=True))
    typer.echo(summary(outcome.report, split, outcome.replicated), err=True)


def summary(report: Report, split: Split, replicated: Replicated = "none") -> str:
    """A sentence on what the first rank of each stage sent; clipping on all ranks."""
    each = "a token and rank" if split.pp_size == 1 else "a token, the first ranks of all stages together"
    bits = "nothing" if report.bits_per_value is None else f"{report.bits_per_value:.4f} bits a value"
    uncompressed = ", ".join(f"{name} {nbytes:.0f}" for name, nbytes in report.uncompressed_bytes_per_token.items())
    prompts = ", ".join(f"{how} ({count})" for how, count in report.prompts.items())
    return (
        f"sent {bits}, {report.wire_bytes_per_token:.0f} bytes {each}"
        + (f"; uncompressed besides, bytes {each}: {uncompressed}" if uncompressed else "")
        + KEPT[replicated]
        + (f"; long prompts {prompts}" if prompts else "")
        + (f"; {report.num_saturated} values clipped on all ranks" if report.num_saturated else "")
        + (f"; {report.num_non_finite} values not finite" if report.num_non_finite else "")
        + (f"; {report.num_guarded} tokens coded by the guard (far out of range)" if report.num_guarded else "")
    )
