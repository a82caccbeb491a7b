"""`narrowcast calibrate`: a model and text in, a plan out, in one process or on the ranks of the split model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from narrowcast.calibration import (
    DEFAULT_FIRST_TOKENS,
    DEFAULT_NUM_FIRST,
    moments_needed,
    recipes_by_kind,
)
from narrowcast.calibration.observers import FirstTokens
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli.options import (
    DEFAULT_CODEC,
    CodecOption,
    Device,
    ExpertsOption,
    Length,
    ModelArgument,
    PipelineParallel,
    TensorParallel,
    Timeout,
    checked_split,
)
from narrowcast.codecs import Recipe, recipe
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation.progress import Options, observe_with_bar
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank, run
from narrowcast.plan import Plan
from narrowcast.plan.split import Split
from narrowcast.transport import DEFAULT_TIMEOUT_S


def calibrate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="Text to calibrate on; form feeds split documents.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the plan goes.")],
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    experts: ExpertsOption = "slices",
    nodes: Annotated[
        int, typer.Option(min=1, help="Nodes that hold --tp ranks in equal parts: sums go within nodes first.")
    ] = 1,
    within: Annotated[str, typer.Option(help="The preset for sums within a node.")] = "bf16",
    codec: CodecOption = [DEFAULT_CODEC],  # noqa: B006 (typer copies it)
    num_sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences at most.")] = 128,
    length: Length = DEFAULT_LENGTH,
    first_tokens: Annotated[
        FirstTokens, typer.Option(help="How each sequence's first tokens count: for all, for outliers only, not.")
    ] = DEFAULT_FIRST_TOKENS,
    num_first: Annotated[int, typer.Option(min=0, help="How many tokens those are.")] = DEFAULT_NUM_FIRST,
    device: Device = "cpu",
    real: Annotated[
        bool, typer.Option("--real", help="On real ranks, each with its part: for a model too large for one process.")
    ] = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    overwrite: Annotated[bool, typer.Option(help="Replace the plan if it exists.")] = False,
) -> None:
    """Calibrate MODEL, split over --tp ranks and --pp stages, and write a plan."""
    split = checked_split(tp, pp, experts)
    chosen = codec_by_kind(codec)
    recipe(within)
    if is_first_rank():
        check_writable(output, overwrite=overwrite)
    options = Options(
        groups=_groups(tp, nodes),
        within=within,
        first_tokens=first_tokens,
        num_first=num_first,
        moments=moments_needed(chosen),
    )
    _check_fittable(options, real, codec)
    found = sequences(load_engine().load_tokenizer(model), text, length=length, limit=num_sequences)
    if real:
        plan = run(_on_rank, split.world_size, model, split, found, chosen, options, timeout_s=timeout)[0]
    else:
        whole = load_engine().load(model, device=device)
        plan = observe_with_bar(whole, found, split, options).plan(chosen, within=within)
    if is_first_rank():
        plan.save(output, overwrite=overwrite)
        number = f"{len(plan.sites)} site" + "s" * (len(plan.sites) != 1)
        typer.echo(f"{output}: {number}, {split}, {', '.join(codec)}{_fitted(plan)}, from {len(found)} sequences")


def _fitted(plan: Plan) -> str:
    """What a codec that is fitted to the whole model was given, or needs."""
    bits, kl = plan.calibration.get("bits"), plan.calibration.get("held_out_kl")
    told = "" if bits is None else f" at {bits:g} bits a value"
    return told if kl is None else f"{told}, KL {kl:.3g} on text that was held out"


def _check_fittable(options: Options, real: bool, codec: Sequence[str]) -> None:
    """Before the work, not after it."""
    if options.moments != "none" and (real or options.groups):
        raise InvalidInputError(
            "--codec",
            expected="one that is not fitted to the whole model, with --real or --nodes",
            found=", ".join(codec),
            remedy="Leave --real and --nodes out, or choose int4-feature, say.",
        )


def _groups(tp_size: int, num_nodes: int) -> list[range]:
    if tp_size % num_nodes:
        raise InvalidInputError(
            "--nodes", expected=f"a divisor of --tp {tp_size}", found=num_nodes, remedy="Choose another number."
        )
    size = tp_size // num_nodes
    return [range(node * size, (node + 1) * size) for node in range(num_nodes)] if num_nodes > 1 else []


def codec_by_kind(options: Sequence[str]) -> dict[str, Recipe]:
    """The recipes that `--codec` asks for: one codec for all kinds that are coded by default, others by kind."""
    named = [option for option in options if "=" in option.partition("(")[0]]
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
    return recipes_by_kind({**recipes_by_kind(rest), **single})


def _on_rank(model: str, split: Split, found: Sequence[Tensor], codec: dict[str, Recipe], options: Options) -> Plan:
    part = load_engine().load(model, split=split)
    return observe_with_bar(part, found, split, options).plan(codec, within=options.within)
