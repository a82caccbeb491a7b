"""`narrowcast evaluate`: what a plan costs in answers, and whether they got worse than in a baseline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli import evaluation_tables as tables
from narrowcast.cli import options
from narrowcast.cli.generate import summary
from narrowcast.cli.options import OUTPUT, TEXT, option
from narrowcast.cli.progress import shown
from narrowcast.cli.tables import screen, table
from narrowcast.cli.verdicts import tell
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import Baseline, Change, Evaluation, evaluate_on_ranks
from narrowcast.evaluation import evaluate as evaluate_simulated
from narrowcast.evaluation.drawings import check_possible
from narrowcast.evaluation.evaluation import Continued, conditions
from narrowcast.evaluation.report import page
from narrowcast.evaluation.tasks import TaskSet, load_tasks
from narrowcast.files import check_report, write_new, write_report
from narrowcast.plan import Plan
from narrowcast.transport import DEFAULT_TIMEOUT_S


def evaluate(
    model: options.ModelArgument,
    plan: options.PlanOption,
    text: Annotated[Path | None, option(TEXT, "FILE", "To score on; by default MODEL/scoring.txt.")] = None,
    num_samples: options.NumSamples = options.DEFAULT_NUM_SAMPLES,
    max_seq_len: options.MaxSeqLen = DEFAULT_LENGTH,
    tasks: Annotated[str, option(TEXT, "NAME,NAME", "Of lm-eval, or YAML files of its.")] = "",
    limit: Annotated[int | None, option(TEXT, "N", "Items of each task at most.")] = None,
    algorithm: options.AlgorithmOption = "auto",
    no_feedback: options.NoFeedback = False,
    prompt_chunks: options.PromptChunks = "auto",
    device: options.Device = "cpu",
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
    real: options.Real = False,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    sites: Annotated[bool, option(OUTPUT, None, "Measure each site alone, too.", "--sites")] = False,
    json: options.JsonOption = None,
    report: Annotated[Path | None, option(OUTPUT, "FILE", "An HTML page; replaces an earlier one.")] = None,
    baseline: Annotated[Path | None, option(OUTPUT, "FILE", "Fail if worse than this --json report.")] = None,
) -> None:
    """Score MODEL with a plan against the uncompressed model: KL, agreement, perplexity, with intervals.

    Of a tuned plan, too, every sum is coded here: what it leaves uncoded for speed makes answers only better.
    """
    _check_files(json, report, baseline)
    if real and sites:
        raise InvalidInputError("--sites", expected="without --real", found="both", remedy="Leave one of them out.")
    asked: dict[str, Any] = {"algorithm": algorithm, "feedback": not no_feedback}
    asked |= {"prompt_chunks": options.prompt_chunks(prompt_chunks)}
    asked |= {"tasks": _tasks(tasks, limit)}
    text = text or Path(model) / "scoring.txt"
    with shown():
        loaded, tokenizer = Plan.load(plan), load_engine().load_tokenizer(model)
        batches = sequences(tokenizer, text, length=max_seq_len, limit=num_samples)
        earlier = None if baseline is None else Baseline.load(baseline)
        if earlier is not None:  # before the work, not after it
            earlier.check(conditions(loaded, batches, algorithm))
        if real:
            found = evaluate_on_ranks(model, plan, batches, dtype=dtype, weights=weights, timeout_s=timeout, **asked)
        else:
            whole = load_engine().load(model, device=device, dtype=dtype, weights=weights)
            found = evaluate_simulated(whole, loaded, batches, sites=sites, tokenizer=tokenizer, **asked)
    if found is None:
        return
    changes = {} if earlier is None else earlier.changes(found)
    about = {"model": model, "dtype": dtype, "weights": weights, "plan": str(plan), "text": str(text)}
    about |= {"baseline": str(baseline)} if changes else {}
    if json is not None:
        _write(json, found, about, changes)
    if report is not None:
        write_new(report, page(found, plan.name, about).encode(), overwrite=True)
    only = f" only ({loaded.simulated_only})" if loaded.simulated_only else ""
    _print(found, f"{model}, {plan}, {loaded.split}, {'real ranks' if real else f'simulated{only}'}")
    _print_texts(found.continued, tokenizer)
    if changes:
        tables.print_changes(changes, f"against {baseline}")
    tell(found.score.kl_nats, f"on {text}")
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
    if names:
        tasks = TaskSet(names=[name.strip() for name in names.split(",") if name.strip()], limit=limit)
        load_tasks(tasks)
        return tasks
    if limit is not None:
        raise InvalidInputError(
            "--limit", expected="--tasks with it", found="none", remedy="Name tasks, such as --tasks arc_easy,piqa."
        )
    return None


def _write(path: Path, found: Evaluation, about: dict[str, str], changes: Mapping[str, Change]) -> None:
    compared = {"changes": {name: each.to_json() for name, each in changes.items()}} if changes else {}
    write_report(path, {**about, **found.to_json(), **compared})


def _print_texts(continued: Continued, tokenizer: Any) -> None:
    """A few tokens that the model says before and after, to a beginning of the text."""
    prompt, before, after = (
        " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        for ids in (continued.prompt, continued.uncompressed, continued.coded)
    )
    typer.echo(f"after: ...{prompt[-60:]}\n  uncompressed: {before}\n  coded:        {after}")


def _print(found: Evaluation, title: str) -> None:
    console = screen()
    figures = table(title, ("figure",), ("value", "uncompressed", "95 % interval"))
    for row in found.figures():
        figures.add_row(*row)
    console.print(figures)
    if found.reference == "split":
        console.print(
            "The uncompressed model does not fit into the first rank's memory: it was split, as the coded one."
        )
    if found.sites:
        console.print(tables.sites(found))
        console.print(tables.sites_together(found))
    console.print(summary(found.report, found.plan.split))
    if found.tasks is not None:
        tables.print_tasks(found.tasks)
