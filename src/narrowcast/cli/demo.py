"""`narrowcast demo`: a real model over real processes, uncompressed and compressed, side by side."""

import os
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

from narrowcast.calibration import observe
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli.generate import summary
from narrowcast.cli.options import DEFAULT_CODEC, DEFAULT_TP, RUN, JsonOption, TensorParallel, option
from narrowcast.cli.progress import calibrating, tracked
from narrowcast.cli.tables import table
from narrowcast.codecs import recipe
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.ranks import Job, Outcome, run_on_ranks
from narrowcast.files import check_report, write_report
from narrowcast.plan.split import Split

ABOUT = {
    "bf16": "plain BF16 sums, the baseline of the texts",
    "int4": "4-bit integers, no outliers",
    "int4-random": "4-bit integers, random features in BF16",
    DEFAULT_CODEC: "the paper's method",
}
BASELINES = "bf16", "int4", "int4-random"
PROMPTS = [
    "It was a dark and stormy night, and",
    "The captain looked at the sea and said",
    "“My dear,” said the old lady,",
]
NUM_CALIBRATION, NUM_SCORING, MAX_NEW_TOKENS = 64, 32, 40


def demo(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="A folder with calibration.txt and scoring.txt; by default ours."),
    ] = None,
    tp: TensorParallel = DEFAULT_TP,
    codec: Annotated[str, option(RUN, "CODEC", "See `narrowcast codecs`.")] = DEFAULT_CODEC,
    json: JsonOption = None,
) -> None:
    """Calibrate a small model, split it over -tp processes, and compare codecs."""
    recipe(codec)
    check_report(json)
    if tp < 2:
        raise InvalidInputError("-tp", expected="2 or more", found=tp, remedy="One rank has nobody to send to.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder: nobody need ask the hub
    folder, names = model or _bundled_model(), list(dict.fromkeys([*BASELINES, codec]))
    tokenizer = load_engine().load_tokenizer(folder)
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as plans:
        _calibrate(folder, tokenizer, tp, [Path(plans) / name for name in names])
        job = Job(
            model=str(folder),
            plans=[Path(plans) / name for name in names],
            batches=sequences(tokenizer, folder / "scoring.txt", length=DEFAULT_LENGTH, limit=NUM_SCORING),
            prompts=prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            track=tracked,
        )
        outcomes = dict(zip(names, run_on_ranks(job, Split(tp_size=tp)), strict=True))
    rows = [_row(name, outcome, outcomes["bf16"]) for name, outcome in outcomes.items()]
    if json is not None:
        write_report(json, {"tp_size": tp, "codecs": rows})
    _print(rows, f"{folder.name} split over {tp} processes")
    Console().print(f"{codec}: {summary(outcomes[codec].report, Split(tp_size=tp))}")
    _print_texts({name: outcomes[name].continuations for name in ("bf16", codec)}, prompts, tokenizer)


def _bundled_model() -> Path:
    found = Path(__file__).parents[3] / "models" / "gutenberg-7m"
    if not found.is_dir():
        raise InvalidInputError(
            "demo",
            expected="the model that comes with the repository and the sdist",
            found="an installed package without it",
            remedy="Run it in a clone, or name a folder.",
        )
    return found


def _calibrate(folder: Path, tokenizer: Any, tp_size: int, plans: Iterable[Path]) -> None:
    """A plan for the codec that each path is named after."""
    text = sequences(tokenizer, folder / "calibration.txt", length=DEFAULT_LENGTH, limit=NUM_CALIBRATION)
    with calibrating(text) as progress:
        seen = observe(load_engine().load(folder), text, tp_size=tp_size, progress=progress)
    for path in plans:
        seen.plan(path.name).save(path)


def _row(name: str, outcome: Outcome, plain: Outcome) -> dict[str, Any]:
    """One codec's figures; `same_text`: its continuations are those of plain sums."""
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


def _print(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    shown = table(title, ("codec",), ("bits/value", "B/token", "perplexity", "KL, nats", "top-1", "same text"))
    for row in rows:
        shown.add_row(
            row["name"],
            "nothing sent" if row["bits_per_value"] is None else f"{row['bits_per_value']:.4f}",
            f"{row['wire_bytes_per_token']:.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_nats']:.5f}",
            f"{row['top1_agreement']:.2%}",
            "yes" if row["same_text"] else "no",
        )
    console = Console()
    console.print(shown)
    console.print("B/token: coded payload bytes that one rank sends for each token")
    for row in rows:
        if about := ABOUT.get(row["name"]):
            console.print(f"{row['name']}: {about}")


def _print_texts(continuations: Mapping[str, list[list[int]]], prompts: Sequence[Tensor], tokenizer: Any) -> None:
    console = Console()
    for name, texts in continuations.items():
        console.print(f"\n[bold]{name}[/]")
        for prompt, ids in zip(prompts, texts, strict=True):
            text = tokenizer.decode([*prompt[0].tolist(), *ids], skip_special_tokens=True)
            console.print(textwrap.indent(text, "  "), markup=False, highlight=False)
