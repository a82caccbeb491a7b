"""`narrowcast evaluate`: what a plan costs in answers, and whether they got worse than in a baseline."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli import evaluation_tables as tables
from narrowcast.cli.generate import summary
from narrowcast.cli.options import (
    DEFAULT_NUM_SAMPLES,
    OUTPUT,
    TEXT,
    AlgorithmOption,
    Device,
    JsonOption,
    MaxSeqLen,
    ModelArgument,
    NumSamples,
    PlanOption,
    Real,
    Timeout,
)
from narrowcast.cli.progress import tracked
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import Baseline, Evaluation, evaluate_on_ranks
from narrowcast.evaluation import evaluate as evaluate_simulated
from narrowcast.evaluation.drawings import check_possible
from narrowcast.evaluation.evaluation import conditions
from narrowcast.evaluation.report import page
from narrowcast.evaluation.tasks import TaskSet, load_tasks
from narrowcast.files import check_report, write_report, write_whole
from narrowcast.plan import Plan
from narrowcast.transport import DEFAULT_TIMEOUT_S


def evaluate(
    model: ModelArgument,
    plan: PlanOption,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To score on; by default MODEL/scoring.txt.", rich_help_panel=TEXT),
    ] = None,
    num_samples: NumSamples = DEFAULT_NUM_SAMPLES,
    max_seq_len: MaxSeqLen = DEFAULT_LENGTH,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Of lm-eval, or YAML files of its.", rich_help_panel=TEXT),
    ] = "",
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Items of each task at most.", rich_help_panel=TEXT)
    ] = None,
    algorithm: AlgorithmOption = "auto",
    device: Device = "cpu",
    real: Real = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    sites: Annotated[
        bool, typer.Option("--sites", help="Measure each site alone, too.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOption = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An HTML page; replaces an earlier one.", rich_help_panel=OUTPUT),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fail if worse than this --json report.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Score MODEL with a plan against the uncompressed model: KL, agreement, perplexity, with intervals.

    Of a tuned plan, too, every sum is coded here: what it leaves uncoded for speed makes answers only better.
    """
    _check_files(json, report, baseline)
    asked = _tasks(tasks, limit)
    text = text or Path(model) / "scoring.txt"
    loaded, tokenizer = Plan.load(plan), load_engine().load_tokenizer(model)
    batches = sequences(tokenizer, text, length=max_seq_len, limit=num_samples)
    earlier = None if baseline is None else _baseline(baseline, text, loaded, batches, algorithm)
    if real and sites:
        raise InvalidInputError("--sites", expected="without --real", found="both", remedy="Leave one of them out.")
    if real:
        found = evaluate_on_ranks(
            model, plan, batches, algorithm=algorithm, tasks=asked, timeout_s=timeout, track=tracked
        )
    else:
        whole = load_engine().load(model, device=device)
        found = evaluate_simulated(
            whole, loaded, batches, algorithm=algorithm, sites=sites, tasks=asked, tokenizer=tokenizer, track=tracked
        )
    if found is None:
        return
    changes = {} if earlier is None else earlier.changes(found)
    about = {"model": model, "plan": str(plan), "text": str(text)}
    if json is not None:
        compared = {"baseline": str(baseline), "changes": {name: each.to_json() for name, each in changes.items()}}
        command = {"command": shlex.join(["narrowcast", *sys.argv[1:]])}
        write_report(json, command | about | found.to_json() | (compared if changes else {}))
    if report is not None:
        write_whole(report, page(found, plan.name, about))
    _print(found, escape(f"{model}, {plan}, {loaded.split}, {'real ranks' if real else 'simulated'}"))
    if changes:
        tables.print_changes(changes, escape(f"against {baseline}"))
    if any(change.verdict == "worse" for change in changes.values()):
        raise typer.Exit(1)


def _check_files(json: Path | None, report: Path | None, baseline: Path | None) -> None:
    check_report(json)
    check_report(report, html=True)
    given = [path for path in (json, report, baseline) if path is not None]
    if len(set(given)) < len(given):
        raise InvalidInputError(
            "--json, --report and --baseline",
            expected="a file for each",
            found=", ".join(map(str, given)),
            remedy="Give one of them another name.",
        )
    if report is not None:
        check_possible()


def _tasks(names: str, limit: int | None) -> TaskSet | None:
    """The tasks that were asked for; refuses what could not be asked before a model is loaded."""
    if not names:
        if limit is not None:
            raise InvalidInputError(
                "--limit",
                expected="--tasks with it",
                found="none",
                remedy="Name the tasks, such as --tasks arc_easy,winogrande.",
            )
        return None
    tasks = TaskSet(names=[name.strip() for name in names.split(",") if name.strip()], limit=limit)
    load_tasks(tasks)
    return tasks


def _baseline(path: Path, text: Path, plan: Plan, batches: list[Tensor], algorithm: str) -> Baseline:
    """The baseline, found under the same conditions; InvalidInputError before the work, not after it."""
    if len(batches) < 2:
        raise InvalidInputError(
            str(text), expected="two sequences or more", found=len(batches), remedy="Pass more text."
        )
    baseline = Baseline.load(path)
    baseline.check(conditions(plan, batches, algorithm))
    return baseline


def _print(found: Evaluation, title: str) -> None:
    console = Console()
    console.print(tables.figures(found, title))
    if found.reference == "split":
        console.print(
            "The uncompressed model does not fit into the first rank's memory: it was split, as the coded one."
        )
    if found.sites:
        console.print(tables.sites(found))
    console.print(summary(found.report, found.plan.split))
    if found.tasks is not None:
        tables.print_tasks(found.tasks)
