"""`narrowcast generate`: prompts continued by a split model with a plan."""

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli import options
from narrowcast.cli.answers import Answers
from narrowcast.cli.options import TEXT, option
from narrowcast.cli.progress import shown
from narrowcast.cli.prompts import encode, read
from narrowcast.engines import Replicated, load_engine
from narrowcast.evaluation.continuations import Said, Sampling
from narrowcast.evaluation.ranks import Job, run_on_ranks
from narrowcast.files import check_report, write_report
from narrowcast.launch import is_first_rank
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.progress import Progress, heard_by
from narrowcast.runtime.reports import Report
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport

KEPT: dict[Replicated, str] = {
    "none": "",
    "embedding": "; embedding whole on every rank",
    "all": "; embedding and output layer whole on every rank",
}


def generate(
    model: options.ModelArgument,
    plan: options.PlanOption,
    prompt: Annotated[list[str], option(TEXT, "TEXT", "To continue; again and again for several.")] = [],  # noqa: B006
    file: Annotated[list[Path], option(TEXT, "FILE", "A prompt in a file; - for standard input.")] = [],  # noqa: B006
    chat: Annotated[bool, option(TEXT, None, "Prompts are a user's words to a chat model.", "--chat")] = False,
    max_new_tokens: Annotated[int, option(TEXT, "N", "Tokens to add at most.", min=1)] = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    transport: options.TransportOption = "auto",
    no_feedback: options.NoFeedback = False,
    prompt_chunks: options.PromptChunks = "auto",
    replicate: options.Replicate = "auto",
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    json: options.JsonOption = None,
) -> None:
    """Continue a prompt on the ranks of a plan, started here, or those of torchrun: text comes as it is said.

    Several prompts run as one batch, whose texts come in the end. Speed and what was sent go to stderr.
    """
    check_transport(transport)
    check_report(json)
    split = Plan.load(plan).split
    prompts = [*prompt, *map(read, file)]
    with shown() as screen:
        tokenizer = load_engine().load_tokenizer(model)
        job = Job(
            model=model,
            plans=[plan],
            transport=transport,
            feedback=not no_feedback,
            prompt_chunks=options.prompt_chunks(prompt_chunks),
            replicated=replicate,
            dtype=dtype,
            weights=weights,
            timeout_s=timeout,
            prompts=encode(tokenizer, prompts, chat=chat),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, seed=seed),
        )
        answers = Answers(tokenizer, prompts)

        def hear(said: object) -> None:
            screen.hear(said)
            if isinstance(said, Said) and is_first_rank():
                if said.ids and len(prompts) == 1:
                    screen.close()
                answers.hear(said)
                screen.hear(Progress("answering, token", max(map(len, answers.ids)), max_new_tokens))

        try:
            with heard_by(hear):
                (outcome,) = run_on_ranks(job, split)
        finally:  # what was said before an error or Ctrl-C is not lost
            screen.close()
            answers.close()
    if is_first_rank():
        typer.echo(f"{answers.speed()}\n{summary(outcome.report, split, outcome.replicated)}", err=True)
        if json is not None:
            about = {"model": model, "plan": str(plan), "dtype": dtype, "weights": weights, "chat": chat}
            about |= {"temperature": temperature, "seed": seed}
            write_report(json, {**about, **answers.to_json(), "report": outcome.report.to_json()})


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
