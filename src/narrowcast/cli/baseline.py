"""`narrowcast baseline`: speed, bytes and quality of a server now, and whether they got worse since then."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from narrowcast import scorecard
from narrowcast.cli import options
from narrowcast.cli.options import OUTPUT, SPLIT, TEXT, option
from narrowcast.cli.progress import shown
from narrowcast.engines import Dtype, Weights
from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.evaluation import Baseline
from narrowcast.files import check_report, check_writable, write_report
from narrowcast.scorecard import SCENARIOS, Record, Scenario, Scorecard, Subject, Workload
from narrowcast.scorecard.page import page
from narrowcast.scorecard.quality import written_by
from narrowcast.scorecard.workload import texts_of
from narrowcast.serving import Job
from narrowcast.serving.remote import is_url

NUM_WORDS = 2  # of each command
GATE = "Gate"

app = typer.Typer(no_args_is_help=True)

Where = Annotated[str, typer.Argument(metavar="URL|MODEL", help="A server's address; a folder, hub name or GGUF file.")]
PlanOption = Annotated[Path | None, option(SPLIT, "FILE", "Of a MODEL: a plan that calibrate wrote.")]
Ranks = Annotated[
    int | None,
    option(SPLIT, "N", "Of a MODEL: ranks; as the plan has it, or 1.", "-tp", "--tensor-parallel-size", min=1),
]


@app.callback()
def baseline() -> None:
    """Measure a server by a fixed workload, and see whether it got worse."""


@app.command()
def record(
    where: Where,
    output: Annotated[Path, option(OUTPUT, "FILE", "The baseline to write.", "--output", "-o")],
    scenario: Annotated[str, option(TEXT, "NAME|FILE", f"{', '.join(SCENARIOS)}, or TOML.")] = "chat",
    rounds: Annotated[int, option(TEXT, "N", "Of its requests.", min=5, max=30)] = 8,
    text: Annotated[Path | None, option(TEXT, "FILE", "To score on; by default the model's own.")] = None,
    num_samples: options.NumSamples = options.DEFAULT_NUM_SAMPLES,
    plan: PlanOption = None,
    tensor_parallel_size: Ranks = None,
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
    api_key: options.ApiKey = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Record what a server of OpenAI's API does with a fixed workload: speed, bytes and quality.

    A MODEL is served for it, as narrowcast serve does. Nothing else should run beside it.
    """
    check_writable(output, overwrite=overwrite)
    check_report(output, num_words=NUM_WORDS)
    chosen = Scenario.load(scenario)
    texts = None if text is None else texts_of(text, num_samples)
    with shown(), _reached(where, chosen, api_key, plan, tensor_parallel_size, dtype, weights) as subject:
        texts = texts or written_by(subject.api, subject.model, num_samples, chosen.concurrency)
        found = scorecard.measured(subject, Workload(scenario=chosen, rounds=rounds, texts=texts))
    write_report(output, found.to_json())
    typer.echo(f"{output}: {found}")


@app.command()
def check(
    where: Where,
    baseline: Annotated[Path, option(GATE, "FILE", "What baseline record wrote.")],
    tolerance: Annotated[str, option(GATE, "PERCENT", "Of speed and bytes.")] = f"{scorecard.DEFAULT_TOLERANCE:.0%}",
    tolerance_nats: Annotated[
        float, option(GATE, "NATS", "Of NLL; 0.01 is 1 % of perplexity.", min=0.0)
    ] = scorecard.DEFAULT_NATS,
    any_hardware: Annotated[bool, option(GATE, None, "Judge speeds of other hardware.", "--any-hardware")] = False,
    plan: PlanOption = None,
    tensor_parallel_size: Ranks = None,
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
    api_key: options.ApiKey = None,
    json: options.JsonOption = None,
) -> None:
    """Do a baseline's work again, and print a scorecard of what moved, in Markdown.

    The status is 0 if nothing got worse, 1 if something did, and 2 if nothing can be said.
    """
    try:
        relative = _share(tolerance)
        if json is not None and json == baseline:
            raise InvalidInputError("--json", expected="a file of its own", found="--baseline", remedy="Rename it.")
        check_report(json, num_words=NUM_WORDS)
        earlier = Baseline.load(baseline)
        before = Record.of(earlier)
        chosen = before.workload.scenario
        with shown(), _reached(where, chosen, api_key, plan, tensor_parallel_size, dtype, weights) as subject:
            now = scorecard.measured(subject, before.workload, earlier)
    except NarrowcastError as error:
        error.exit_status = 2  # 1 says that something got worse
        raise
    card = Scorecard.of(before, now, tolerance=relative, nats=tolerance_nats, any_hardware=any_hardware)
    if json is not None:
        write_report(json, card.to_json())
    typer.echo(page(card, f"{baseline} of {earlier.report['date']}"))
    if card.worse:
        raise typer.Exit(1)


@contextmanager
def _reached(
    where: str,
    scenario: Scenario,
    api_key: str | None,
    plan: Path | None,
    tp_size: int | None,
    dtype: Dtype,
    weights: Weights,
) -> Iterator[Subject]:
    if not is_url(where):
        with scorecard.started(
            Job(model=where, plan=plan, tp_size=tp_size, dtype=dtype, weights=weights), scenario
        ) as s:
            yield s
        return
    given = {"--plan": plan, "-tp": tp_size, "--dtype": dtype != "auto", "--weights": weights != "stored"}
    for name, value in given.items():
        if value:
            raise InvalidInputError(
                name, expected="a MODEL, which is served so", found="the URL of a server", remedy="Leave it out."
            )
    yield scorecard.at(where, scenario, api_key=api_key)


def _share(text: str) -> float:
    """Of 5%, 0.05."""
    number, percent, rest = text.partition("%")
    try:
        found = float(number) / 100
    except ValueError:
        found = -1.0
    if not percent or rest.strip() or not 0 <= found < 10:
        raise InvalidInputError("--tolerance", expected="a percentage", found=repr(text), remedy="Write it as 5%.")
    return found
