"""`narrowcast demo`: a real model over real processes, uncompressed and compressed, side by side."""

import os
import tempfile
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import narrowcast
from narrowcast.calibration.text import sequences
from narrowcast.cli.options import Algorithm, TransportOption
from narrowcast.codecs import recipe
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.job import Job, Outcome, reference_of, run_on_ranks
from narrowcast.evaluation.progress import Options, observe_with_bar
from narrowcast.files import check_report, write_report
from narrowcast.plan.split import Split

BASELINES = ["bf16", "int4", "int4-random"]
WHAT = {
    "bf16": "plain BF16 sums, the baseline of the texts",
    "int4": "4-bit integers, no outliers",
    "int4-random": "4-bit integers, random features in BF16",
    "int4-feature": "the paper's method",
}
PROMPTS = [
    "It was a dark and stormy night, and",
    "The captain looked at the sea and said",
    "“My dear,” said the old lady,",
]
NUM_CALIBRATION, NUM_SCORING, LENGTH, MAX_NEW_TOKENS = 64, 32, 256, 40


def demo(
    tp: Annotated[int, typer.Option("--tp", "-tp", "--tensor-parallel-size", min=2, help="Number of ranks.")] = 2,
    codec: Annotated[str, typer.Option(help=f"A preset: {', '.join(narrowcast.PRESETS)}.")] = "int4-feature",
    json: Annotated[Path | None, typer.Option(help="Write the figures here; replaces an earlier report.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model folder with calibration.txt and scoring.txt.")] = None,
    algorithm: Algorithm = "auto",
    transport: TransportOption = "auto",
) -> None:
    """Calibrate the bundled model, split it over --tp processes, and compare codecs."""
    recipe(codec)
    check_report(json)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder: nobody need ask the hub
    folder = model or _bundled_model()
    engine, names = load_engine(), [*BASELINES, *([codec] if codec not in BASELINES else [])]
    tokenizer, whole = engine.load_tokenizer(folder), engine.load(folder)
    text = sequences(tokenizer, folder / "calibration.txt", length=LENGTH, limit=NUM_CALIBRATION)
    batches = sequences(tokenizer, folder / "scoring.txt", length=LENGTH, limit=NUM_SCORING)
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as plans, reference_of(whole, batches) as reference:
        seen = observe_with_bar(whole, text, Split(tp_size=tp), Options())
        for name in names:
            seen.plan(name).save(f"{plans}/{name}")
        job = Job(
            model=str(folder),
            plans=[Path(plans) / name for name in names],
            algorithm=algorithm,
            transport=transport,
            batches=batches,
            reference=reference,
            prompts=prompts,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        outcomes = dict(zip(names, run_on_ranks(job, Split(tp_size=tp)), strict=True))
    rows = [_row(name, outcome, outcomes["bf16"]) for name, outcome in outcomes.items()]
    if json is not None:
        write_report(json, {"tp_size": tp, "algorithm": algorithm, "codecs": rows})
    _print(rows, outcomes, codec, f"{folder.name} split over {tp} processes")
    _print_texts({name: outcomes[name].continuations for name in ("bf16", codec)}, prompts, tokenizer)


def _bundled_model() -> Path:
    found = Path(__file__).parents[3] / "models" / "gutenberg-7m"
    if not found.is_dir():
        raise InvalidInputError(
            "demo",
            expected="the model that comes with the repository and the sdist",
            found="an installed package without it",
            remedy="Run it in a clone, or pass --model FOLDER.",
        )
    return found


def _row(name: str, outcome: Outcome, plain: Outcome) -> dict[str, Any]:
    assert outcome.score is not None, "the demo scores"
    return {
        "name": name,
        "bits_per_value": outcome.report.bits_per_value,
        "wire_bytes_per_token": outcome.report.wire_bytes_per_token,
        "perplexity": outcome.score.perplexity,
        "kl_nats": outcome.score.kl_nats,
        "top1_agreement": outcome.score.top1_agreement,
        "same_text": outcome.continuations == plain.continuations,
    }


def _print(rows: list[dict[str, Any]], outcomes: dict[str, Outcome], codec: str, title: str) -> None:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("codec", no_wrap=True)
    for column in ("bits/value", "B/token", "perplexity", "KL, nats", "top-1", "same text"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        bits = row["bits_per_value"]
        table.add_row(
            row["name"],
            "nothing sent" if bits is None else f"{bits:.4f}",
            f"{row['wire_bytes_per_token']:.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_nats']:.5f}",
            f"{row['top1_agreement']:.2%}",
            "yes" if row["same_text"] else "no",
        )
    console = Console()
    console.print(table)
    console.print("B/token: coded payload bytes that one rank sends for each token")
    for name in (name for name in outcomes if name in WHAT):
        console.print(f"{name}: {WHAT[name]}")
    uncompressed = outcomes[codec].report.uncompressed_bytes_per_token
    console.print(
        "Travels uncompressed besides, bytes a token and rank: "
        + (", ".join(f"{name} {nbytes:.0f}" for name, nbytes in uncompressed.items()) or "nothing")
    )


def _print_texts(continuations: dict[str, list[list[int]]], prompts: list[Tensor], tokenizer: Any) -> None:
    console = Console()
    for name, texts in continuations.items():
        console.print(f"\n[bold]{name}[/]")
        for prompt, ids in zip(prompts, texts, strict=True):
            text = tokenizer.decode([*prompt[0].tolist(), *ids], skip_special_tokens=True)
            console.print(textwrap.indent(text, "  "), markup=False, highlight=False)
