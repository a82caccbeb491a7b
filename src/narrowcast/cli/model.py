"""`narrowcast evaluate` and `generate`: a model, and a plan for it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast import Plan
from narrowcast.cli.files import DEFAULT_LENGTH, check_report, sequences, write_report
from narrowcast.cli.job import Job, Outcome, reference_of, run_on_ranks, run_simulated
from narrowcast.cli.launch import is_first_rank
from narrowcast.cli.options import (
    Algorithm,
    Device,
    Length,
    ModelArgument,
    PlanOption,
    ReplicateVocabulary,
    Timeout,
    TransportOption,
)
from narrowcast.errors import InvalidInputError
from narrowcast.integrations import load_engine
from narrowcast.split import Split
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport


def evaluate(
    model: ModelArgument,
    plan: PlanOption,
    real: Annotated[bool, typer.Option("--real", help="On real ranks; without it, simulated in one process.")] = False,
    text: Annotated[Path | None, typer.Option(help="Text to score on; by default MODEL/scoring.txt.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here; replaces an earlier report.")] = None,
    num_sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences at most.")] = 32,
    length: Length = DEFAULT_LENGTH,
    algorithm: Algorithm = "auto",
    transport: TransportOption = "auto",
    replicate_vocabulary: ReplicateVocabulary = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    device: Device = "cpu",
) -> None:
    """Score MODEL with a plan against the uncompressed model: perplexity, KL divergence, top-1 agreement.

    Of a tuned plan, too, every sum is coded here: what it leaves uncoded for speed makes answers only better.
    The uncompressed model's log-probabilities wait in the temporary folder: 4 bytes a token and vocabulary entry.
    """
    check_report(json)
    check_transport(transport)
    split = Plan.load(plan).split
    engine = load_engine()
    batches = sequences(
        engine.load_tokenizer(model), text or Path(model) / "scoring.txt", length=length, limit=num_sequences
    )
    whole = engine.load(model, device=device)
    with reference_of(whole, batches) as reference:
        job = Job(
            model=model,
            plans=[plan],
            algorithm=algorithm,
            transport=transport,
            replicate_vocabulary=replicate_vocabulary,
            timeout_s=timeout,
            batches=batches,
            reference=reference,
        )
        (outcome,) = run_on_ranks(job, split) if real else run_simulated(job, whole)
    if not is_first_rank():
        return
    assert outcome.score is not None, "there were batches"
    figures = asdict(outcome.score) | outcome.report.to_json() | asdict(split) | {"algorithm": algorithm}
    if json is not None:
        write_report(json, figures | {"model": model, "plan": str(plan), "real": real})
    where = "real ranks" if real else "simulated"
    _print_figures(outcome, split, escape(f"{model}, {plan}, {split}, {where}"))


def generate(
    model: ModelArgument,
    plan: PlanOption,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    algorithm: Algorithm = "auto",
    transport: TransportOption = "auto",
    replicate_vocabulary: ReplicateVocabulary = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Continue prompts greedily on the ranks of a plan: started here, or those of torchrun."""
    check_transport(transport)
    split = Plan.load(plan).split
    tokenizer = load_engine().load_tokenizer(model)
    prompts = [tokenizer(each, return_tensors="pt").input_ids for each in prompt]
    if any(ids.shape[1] == 0 for ids in prompts):
        raise InvalidInputError("--prompt", expected="text", found="nothing", remedy="Pass at least a word.")
    job = Job(
        model=model,
        plans=[plan],
        algorithm=algorithm,
        transport=transport,
        replicate_vocabulary=replicate_vocabulary,
        timeout_s=timeout,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
    )
    (outcome,) = run_on_ranks(job, split)
    if not is_first_rank():
        return
    for start, ids in zip(prompts, outcome.continuations, strict=True):
        typer.echo(tokenizer.decode([*start[0].tolist(), *ids], skip_special_tokens=True))
    typer.echo(summary(outcome, split), err=True)


def summary(outcome: Outcome, split: Split) -> str:
    """What the first rank of each stage sent, in a sentence; clipping on all ranks."""
    report = outcome.report
    each = "a token and rank" if split.pp_size == 1 else "a token, the first ranks of all stages together"
    bits = "nothing" if report.bits_per_value is None else f"{report.bits_per_value:.4f} bits a value"
    uncompressed = ", ".join(f"{name} {nbytes:.0f}" for name, nbytes in report.uncompressed_bytes_per_token.items())
    return (
        f"sent {bits}, {report.wire_bytes_per_token:.0f} bytes {each}"
        + (f"; uncompressed besides, bytes {each}: {uncompressed}" if uncompressed else "")
        + (f"; {report.num_saturated} values clipped on all ranks" if report.num_saturated else "")
        + (f"; {report.num_non_finite} values not finite" if report.num_non_finite else "")
        + (f"; {report.num_guarded} tokens coded by the guard (far out of range)" if report.num_guarded else "")
    )


def _print_figures(outcome: Outcome, split: Split, title: str) -> None:
    assert outcome.score is not None, "there were batches"
    table = Table("figure", "value", title=title)
    table.add_row("perplexity", f"{outcome.score.perplexity:.4f}")
    table.add_row("KL from the uncompressed model, nats", f"{outcome.score.kl_nats:.5f}")
    table.add_row("top-1 agreement", f"{outcome.score.top1_agreement:.2%}")
    table.add_row("tokens scored", str(outcome.score.num_tokens))
    console = Console()
    console.print(table)
    console.print(summary(outcome, split))
