"""`narrowcast calibrate`: a model and text in, a plan out, in one process or on the ranks of the split model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from narrowcast.calibration import (
    DEFAULT_FIRST_TOKENS,
    CodecByKind,
    by_kind,
    moments_needed,
    observe,
    recipes_by_kind,
)
from narrowcast.calibration.observers import FirstTokens
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli.options import (
    DEFAULT_CODEC,
    DEFAULT_NUM_SAMPLES,
    DEFAULT_TP,
    OUTPUT,
    SPLIT,
    TEXT,
    CodecOption,
    Device,
    ExpertsOption,
    MaxSeqLen,
    ModelArgument,
    NumSamples,
    Overwrite,
    PipelineParallel,
    Real,
    TensorParallel,
    Timeout,
    checked_split,
)
from narrowcast.cli.progress import calibrating
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank, run
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.transport import DEFAULT_TIMEOUT_S

OF_ONE_KIND = re.compile(r"\w+=")  # not allocated(bits=2)


def calibrate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="To calibrate on.", rich_help_panel=TEXT)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The plan.", rich_help_panel=OUTPUT)],
    tp: TensorParallel = DEFAULT_TP,
    pp: PipelineParallel = 1,
    experts: ExpertsOption = "slices",
    nnodes: Annotated[
        int,
        typer.Option("--nnodes", metavar="N", min=1, help="Sums go within nodes first.", rich_help_panel=SPLIT),
    ] = 1,
    codec: CodecOption = [DEFAULT_CODEC],  # noqa: B006 (typer copies it)
    num_samples: NumSamples = DEFAULT_NUM_SAMPLES,
    max_seq_len: MaxSeqLen = DEFAULT_LENGTH,
    first_tokens: Annotated[
        FirstTokens,
        typer.Option(metavar="NAME", help="count, choosing, or skip.", rich_help_panel=TEXT),
    ] = DEFAULT_FIRST_TOKENS,
    device: Device = "cpu",
    real: Real = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    overwrite: Overwrite = False,
) -> None:
    """Calibrate MODEL, split over -tp ranks and -pp stages, and write a plan.

    Form feeds split documents. --experts: slices of each on every rank, or whole ones (docs/integrations.md).
    """
    split, groups = checked_split(tp, pp, experts), _groups(tp, nnodes)
    chosen = codec_by_kind(codec)
    if is_first_rank():
        check_writable(output, overwrite=overwrite)
    options = {"groups": groups, "first_tokens": first_tokens, "moments": moments_needed(chosen)}
    if options["moments"] != "none" and (real or groups):  # before the work, not after it
        raise InvalidInputError(
            "--codec",
            expected="one that is not fitted to the whole model, with --real or --nnodes",
            found=", ".join(codec),
            remedy="Leave --real and --nnodes out, or choose int4-feature, say.",
        )
    found = sequences(load_engine().load_tokenizer(model), text, length=max_seq_len, limit=num_samples)
    if real:
        (plan, *_) = run(_on_rank, split.world_size, model, found, split, chosen, options, timeout_s=timeout)
    else:
        plan = _plan(load_engine().load(model, device=device), found, split, chosen, options)
    if is_first_rank():
        plan.save(output, overwrite=overwrite)
        number = f"{len(plan.sites)} site" + "s" * (len(plan.sites) != 1)
        typer.echo(f"{output}: {number}, {split}, {', '.join(codec)}{_fitted(plan)}, from {len(found)} sequences")


def _groups(tp_size: int, num_nodes: int) -> list[range]:
    if tp_size % num_nodes:
        raise InvalidInputError(
            "--nnodes", expected=f"a divisor of -tp {tp_size}", found=num_nodes, remedy="Choose another number."
        )
    size = tp_size // num_nodes
    return [range(node * size, (node + 1) * size) for node in range(num_nodes)] if num_nodes > 1 else []


def codec_by_kind(options: Sequence[str]) -> CodecByKind:
    """The codecs that `--codec` names: one for all kinds that are coded unless asked otherwise, others for one kind."""
    named = [option for option in options if OF_ONE_KIND.match(option)]
    single = dict(option.split("=", 1) for option in named)
    general = [option for option in options if option not in named]
    if len(general) > 1 or len(single) < len(named):
        raise InvalidInputError(
            "--codec",
            expected="one codec for all kinds, and at most one for each kind",
            found=", ".join(options),
            remedy="Use KIND=CODEC, once a kind.",
        )
    rest = general[0] if general else DEFAULT_CODEC
    codec: CodecByKind = {**by_kind(rest), **single} if single else rest
    recipes_by_kind(codec)
    return codec


def _on_rank(model: str, found: Sequence[Tensor], split: Split, codec: CodecByKind, options: dict[str, Any]) -> Plan:
    return _plan(load_engine().load(model, split=split), found, split, codec, options)


def _plan(model: Any, found: Sequence[Tensor], split: Split, codec: CodecByKind, options: dict[str, Any]) -> Plan:
    with calibrating(found) as progress:
        seen = observe(
            model,
            found,
            tp_size=split.tp_size,
            pp_size=split.pp_size,
            experts=split.experts,
            progress=progress,
            **options,
        )
    return seen.plan(codec)


def _fitted(plan: Plan) -> str:
    """The budget of a codec that is fitted to the whole model, and what it costs."""
    bits, kl = plan.calibration.get("bits"), plan.calibration.get("held_out_kl")
    told = "" if bits is None else f" at {bits:g} bits a value"
    return told if kl is None else f"{told}, KL {kl:.3g} on text that was held out"
