"""`narrowcast count`: what a split model would send, site by site, before anything is calibrated or split."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import narrowcast
from narrowcast.cli.calibrate import codec_by_kind
from narrowcast.cli.options import (
    DEFAULT_CODEC,
    AlgorithmOption,
    CodecOption,
    Device,
    ExpertsOption,
    ModelArgument,
    PipelineParallel,
    TensorParallel,
    checked_split,
)
from narrowcast.engines import device_of, load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_report, write_report
from narrowcast.plan import Plan
from narrowcast.runtime.counters import Report

FIGURES = "prompt", "prompt_plain", "token", "token_plain"
NUM_CALIBRATION_TOKENS = 16  # sizes do not depend on values, so that few will do


def count(
    model: ModelArgument,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    experts: ExpertsOption = "slices",
    codec: CodecOption = [DEFAULT_CODEC],  # noqa: B006 (typer copies it)
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    algorithm: AlgorithmOption = "auto",
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the figures here; replaces an earlier report.")] = None,
) -> None:
    """Count what MODEL, split over --tp ranks and --pp stages, would send for a prompt and for each token after it.

    Counted for the first rank of each stage. The model runs whole, in this process, on random tokens.
    """
    check_report(json)
    chosen, split = codec_by_kind(codec), checked_split(tp, pp, experts)
    whole = load_engine().load(model, device=device)
    config: Any = whole.config.get_text_config()  # type: ignore[union-attr, operator]
    if tokens > (longest := getattr(config, "max_position_embeddings", tokens)):
        raise InvalidInputError(
            "--tokens", expected=f"at most {longest}, the model's context", found=tokens, remedy="Pass fewer."
        )
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device_of(whole))
    plan = narrowcast.calibrate(
        whole, [ids[:, :NUM_CALIBRATION_TOKENS]], tp_size=tp, pp_size=pp, experts=experts, codec=chosen
    )
    prompt, decoded = (_counted(whole, plan, each, algorithm) for each in (ids, ids[:, :1]))
    rows = _rows(plan, prompt, decoded)
    if json is not None:
        write_report(json, {"model": model, **asdict(split), "codec": codec, "tokens": tokens, "sites": rows})
    _print(rows, f"{Path(model).name}, {split}, {', '.join(codec)}", tokens)


def _counted(model: nn.Module, plan: Plan, ids: torch.Tensor, algorithm: str) -> Report:
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, count_only=True, algorithm=algorithm) as handle:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return handle.report()


def _rows(plan: Plan, prompt: Report, decoded: Report) -> list[dict[str, Any]]:
    """Sites that differ in their layer's number alone are one row."""
    rows: dict[str, dict[str, Any]] = {}
    for name, site in prompt.sites.items():
        after, kind = decoded.sites[name], plan.sites[name].kind if name in plan.sites else "not coded"
        starred = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        zeros = dict.fromkeys(("number", *FIGURES), 0)
        row = rows.setdefault(starred, {"site": starred, "kind": kind, **zeros})
        row["number"] += 1
        row["prompt"] += site.wire_bytes
        row["prompt_plain"] += site.plain_bytes
        row["token"] += after.wire_bytes
        row["token_plain"] += after.plain_bytes
    return list(rows.values())


def _print(rows: list[dict[str, Any]], title: str, tokens: int) -> None:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("site", "kind"):
        table.add_column(column, no_wrap=True)
    for column in ("sites", f"{tokens} tokens", "plain", "1 token", "plain"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        sizes = (_size(row[figure]) for figure in FIGURES)
        table.add_row(row["site"].removeprefix("model."), row["kind"], str(row["number"]), *sizes)
    table.add_section()
    sums = {figure: sum(row[figure] for row in rows) for figure in FIGURES}
    table.add_row("all", "", str(sum(row["number"] for row in rows)), *(_size(sums[figure]) for figure in FIGURES))
    console = Console()
    console.print(table)
    console.print("Payload bytes that the first rank of each stage sends, for a prompt and for each token after it;")
    console.print("plain: the same values in the model's own dtype.")
    if sums["prompt"]:
        prompt, token = sums["prompt_plain"] / sums["prompt"], sums["token_plain"] / sums["token"]
        console.print(f"{prompt:.2f} times fewer bytes for the prompt, {token:.2f} times fewer for a token.")


def _size(nbytes: float) -> str:
    """Exact up to four digits, three digits of more."""
    if nbytes < 10_000:
        return str(round(nbytes))
    for unit in ("K", "M"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.3g}{unit}"
    return f"{nbytes / 1000:.3g}G"
