"""`narrowcast evaluate` and `generate`: a model, and a plan for it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from narrowcast.calibration.text import DEFAULT_LENGTH
from narrowcast.cli.options import (
    Algorithm,
    Device,
    Length,
    ModelArgument,
    PlanOption,
    Real,
    ReplicateVocabulary,
    ScoringText,
    Timeout,
    TransportOption,
)
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.drawings import short
from narrowcast.evaluation.evaluation import CURVE, FIGURES, Evaluation, Subject
from narrowcast.evaluation.job import Job, run_on_ranks
from narrowcast.evaluation.report import page
from narrowcast.evaluation.task_run import Limit, TasksData, TasksOption, chosen_tasks, print_tasks
from narrowcast.files import check_report, write_report, write_whole
from narrowcast.launch import is_first_rank
from narrowcast.perf.plots import check_possible
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.runtime.counters import Report
from narrowcast.transport import DEFAULT_TIMEOUT_S, check_transport


def evaluate(
    model: ModelArgument,
    plan: PlanOption,
    real: Real = False,
    text: ScoringText = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here; replaces an earlier report.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with pictures here; replaces an earlier one.")
    ] = None,
    sites: Annotated[
        bool, typer.Option("--sites", help="Measure too what each site alone adds to the KL divergence, simulated.")
    ] = False,
    curve: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help=f"Calibrate {', '.join(CURVE)} on TEXT and score them too, simulated."),
    ] = None,
    curve_json: Annotated[
        list[Path],
        typer.Option(help="Put the points of an earlier --json report into the page; may be given several times."),
    ] = [],  # noqa: B006 (typer copies it)
    num_sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences at most.")] = 32,
    length: Length = DEFAULT_LENGTH,
    tasks: TasksOption = "",
    tasks_data: TasksData = None,
    limit: Limit = None,
    algorithm: Algorithm = "auto",
    transport: TransportOption = "auto",
    replicate_vocabulary: ReplicateVocabulary = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    device: Device = "cpu",
) -> None:
    """Score MODEL with a plan against the uncompressed model: KL divergence, agreement, perplexity, with intervals.

    Of a tuned plan, too, every sum is coded here: what it leaves uncoded for speed makes answers only better.
    The uncompressed model's log-probabilities wait in the temporary folder: 4 bytes a token and vocabulary entry.
    """
    check_report(json)
    check_report(report, html=True)
    if report is not None and report == json:
        raise InvalidInputError(
            "--report and --json", expected="two files", found=str(json), remedy="Give one of them another name."
        )
    if report is not None:
        check_possible()
    asked = chosen_tasks(tasks, tasks_data, limit)
    subject = Subject.load(
        model,
        plan,
        text,
        num_sequences=num_sequences,
        length=length,
        algorithm=algorithm,
        real=real,
        transport=transport,
        replicate_vocabulary=replicate_vocabulary,
        timeout_s=timeout,
        device=device,
    )
    others = [point for path in curve_json for point in subject.points(path)]
    found = subject.evaluate(sites=sites, curve=curve, tasks=asked)
    if found is None:
        return
    if json is not None:
        write_report(json, found.to_json())
    if report is not None:
        write_whole(report, page(found, [*found.curve, *others]))
    where = "real ranks" if real else "simulated"
    _print(found, escape(f"{model}, {plan}, {subject.plan.split}, {where}"))
    if found.tasks is not None:
        print_tasks(found.tasks)


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
    typer.echo(summary(outcome.report, split), err=True)


def summary(report: Report, split: Split) -> str:
    """What the first rank of each stage sent, in a sentence; clipping on all ranks."""
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


def _print(found: Evaluation, title: str) -> None:
    """Figures with their intervals; errors by site and other codecs' points, if there are any."""
    table = Table("figure", "value", "95 % interval", title=title)
    for name, (what, form) in FIGURES.items():
        interval = found.score.intervals[name]
        cell = "" if interval is None else f"{form.format(interval.low)} to {form.format(interval.high)}"
        table.add_row(what, form.format(getattr(found.score, name)), cell)
    for percentile, value in found.score.kl_percentiles.items():
        what = "largest KL of a token" if percentile == "100" else f"KL, {percentile} % of tokens at most"
        table.add_row(what, f"{value:.5f}")
    table.add_row("tokens scored", str(found.score.num_tokens))
    console = Console()
    console.print(table)
    if found.sites:
        console.print(_sites_table(found))
    if found.curve:
        rows = Table("codec", "bits a value", "KL, nats", "95 % interval")
        for point in sorted([*found.curve, found.point], key=lambda point: point.bits_per_value):
            cells = f"{point.bits_per_value:.4f}", f"{point.kl_nats:.5f}", f"{point.low:.5f} to {point.high:.5f}"
            rows.add_row(point.name, *cells)
        console.print(rows)
    console.print(summary(found.report, found.subject.plan.split))


def _sites_table(found: Evaluation) -> Table:
    """What each site adds, the worst first."""
    table = Table("site", "KL added, nats", "95 % interval", "error", "clipped", title="each site coded alone")
    for each in sorted(found.sites, key=lambda each: -each.added_kl_nats.mean):
        interval, errors = each.added_kl_nats.interval(), found.subject.plan.sites[each.site].error
        table.add_row(
            short(each.site),
            f"{each.added_kl_nats.mean:.6f}",
            "" if interval is None else f"{interval.low:.6f} to {interval.high:.6f}",
            "" if not errors else f"{next(iter(errors.values())):.4f}",
            str(each.report.num_saturated),
        )
    return table
