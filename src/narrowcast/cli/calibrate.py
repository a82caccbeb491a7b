"""`narrowcast calibrate`: a model and text in, a plan out, in one process or on the ranks of the split model."""

import contextlib
import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from narrowcast.calibration import DEFAULT_CODEC, DEFAULT_FIRST_TOKENS, moments_needed, observe, recipes_by_kind
from narrowcast.calibration.observers import FirstTokens
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli import options
from narrowcast.cli.options import OUTPUT, SPLIT, TEXT, option
from narrowcast.cli.progress import shown
from narrowcast.cli.verdicts import tell
from narrowcast.codecs import FittedRecipe, Recipe, TransformRecipe, recipe
from narrowcast.engines import Dtype, Weights, load_engine
from narrowcast.engines.parts import load_part
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank, run
from narrowcast.plan import Plan
from narrowcast.plan.plan import is_plan, spelling
from narrowcast.plan.split import Split
from narrowcast.plan.summary import doubts, mean_bits, numbered
from narrowcast.transport import DEFAULT_TIMEOUT_S

M_MMAP_THRESHOLD = -3  # malloc.h of glibc
OF_ONE_KIND = re.compile(r"\w+=")  # not allocated(bits=2)


def calibrate(
    model: options.ModelArgument,
    text: Annotated[Path, option(TEXT, "FILE", "To calibrate on.")],
    output: Annotated[Path, option(OUTPUT, "FILE", "The plan.", "-o", "--output")],
    tp: options.TensorParallel = options.DEFAULT_TP,
    pp: options.PipelineParallel = 1,
    experts: options.ExpertsOption = "slices",
    nnodes: Annotated[int, option(SPLIT, "N", "Sums go within nodes first.", min=1)] = 1,
    target_kl: options.TargetKl = None,
    bits: options.Bits = None,
    codec: options.CodecOption = [],  # noqa: B006 (typer copies it)
    no_feedback: options.NoFeedback = False,
    num_samples: options.NumSamples = options.DEFAULT_NUM_SAMPLES,
    max_seq_len: options.MaxSeqLen = DEFAULT_LENGTH,
    first_tokens: Annotated[FirstTokens, option(TEXT, "NAME", "count, choosing, or skip.")] = DEFAULT_FIRST_TOKENS,
    device: options.Device = "cpu",
    dtype: options.DtypeOption = "auto",
    weights: options.WeightsOption = "stored",
    real: options.Real = False,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    overwrite: options.Overwrite = False,
) -> None:
    """Calibrate MODEL, split over -tp ranks and -pp stages, and write a plan.

    Takes as few bits as keep its answers, or as are asked for. Form feeds split documents.
    """
    split, groups = options.checked_split(tp, pp, experts), _groups(tp, nnodes)
    chosen = codec_by_kind(codec, bits=bits, target_kl=target_kl)
    if is_first_rank():
        check_writable(output, overwrite=overwrite)
        _check_plan(output)
    if isinstance(chosen.get("sum"), TransformRecipe) and (real or groups):  # before the work, not after it
        raise InvalidInputError(
            "--codec",
            expected="no transform with --real or --nnodes, as it takes gradients of the whole model",
            found=", ".join(codec),
            remedy="Leave --real and --nnodes out, or choose allocated.",
        )
    moments = moments_needed(chosen)
    if moments == "full":
        _give_back_what_is_freed()
    asked = {**asdict(split), "groups": groups, "first_tokens": first_tokens, "moments": moments}
    with shown():
        engine = load_engine()
        obstacle = engine.obstacle(engine.skeleton(model), split)
        if obstacle and is_first_rank():
            typer.echo(f"simulated only: {obstacle}", err=True)
        found = sequences(engine.load_tokenizer(model), text, length=max_seq_len, limit=num_samples)
        given = found, chosen, asked, not no_feedback
        if real:
            plans = run(_on_rank, split.world_size, model, split, dtype, weights, *given, timeout_s=timeout)
            plan = Plan.from_bytes(plans[0], output)
        else:
            plan = _plan(engine.load(model, device=device, dtype=dtype, weights=weights), *given)
    if is_first_rank():
        plan.save(output, overwrite=overwrite)
        about, bits = plan.calibration, mean_bits(plan)
        what = spelling(about["codec"]) + ("" if bits is None else f", {bits:.4g} bits a value")
        seen = f"{numbered(about['num_sequences'], 'sequence')}, {numbered(about['num_tokens'], 'token')}"
        held_out = f"{about['num_held_out'] or 'none'} held out"
        sites = numbered(len(plan.sites), "site")
        typer.echo(f"{output}: {sites}, {split}, {what}, from {seen}; {held_out}; {_size(output)}")
        for doubt in doubts(plan):
            typer.echo(f"warning: {doubt}", err=True)
        if plan.simulated_only:
            typer.echo(f"simulated only: {plan.simulated_only}")
        tell(about["kl_nats"], "on text that was held out" if about["num_held_out"] else "on a part of this very text")


def _check_plan(output: Path) -> None:
    """InvalidInputError for a file that no earlier run wrote: --overwrite is for plans."""
    if output.is_file() and output.stat().st_size and not is_plan(output):
        raise InvalidInputError(
            str(output),
            expected="a new file, or a plan to replace",
            found="another file",
            remedy="Choose another name.",
        )


def _size(path: Path) -> str:
    """Of a file: the price of axes, which may be as large as the model."""
    nbytes = path.stat().st_size
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.3g} KB"


def _give_back_what_is_freed() -> None:
    """Let glibc map each matrix by itself: on its heap, whose holes fit no other, they take twice the memory."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def codec_by_kind(
    asked: Sequence[str], *, bits: float | None = None, target_kl: float | None = None
) -> dict[str, Recipe]:
    """The recipes that `--codec` asks for: one codec for all kinds that are coded by default, others by kind.

    `bits` or `target_kl` are those of the one codec, which must be one that has a choice.
    """
    single = dict(each.split("=", 1) for each in asked if OF_ONE_KIND.match(each))
    general = [each for each in asked if not OF_ONE_KIND.match(each)]
    if len(general) > 1 or len(general) + len(single) < len(asked):
        raise InvalidInputError(
            "--codec",
            expected="one codec for all kinds, and at most one for each kind",
            found=", ".join(asked),
            remedy="Use KIND=CODEC, once a kind.",
        )
    rest: Recipe = recipe(general[0]) if general else DEFAULT_CODEC
    if bits is not None or target_kl is not None:
        if not isinstance(rest, FittedRecipe) or (general and (rest.bits or rest.target_kl)):
            raise InvalidInputError(
                "--bits and --target-kl",
                expected="a codec that has a choice: allocated, or transform",
                found=rest,
                remedy="Leave them out, or --codec.",
            )
        rest = replace(rest, bits=bits, target_kl=target_kl)
    return recipes_by_kind({**recipes_by_kind(rest), **single})


def _groups(tp_size: int, num_nodes: int) -> list[range]:
    if tp_size % num_nodes:
        raise InvalidInputError(
            "--nnodes", expected=f"a divisor of -tp {tp_size}", found=num_nodes, remedy="Choose another number."
        )
    size = tp_size // num_nodes
    return [range(node * size, (node + 1) * size) for node in range(num_nodes)] if num_nodes > 1 else []


def _on_rank(model: str, split: Split, dtype: Dtype, weights: Weights, *given: Any) -> bytes:
    part = load_part(load_engine(), model, split=split, dtype=dtype, weights=weights)
    return _plan(part, *given).to_bytes()


def _plan(
    model: nn.Module,
    found: Sequence[Tensor],
    codec: Mapping[str, Recipe],
    asked: Mapping[str, Any],
    feedback: bool,
) -> Plan:
    """The plan of a whole model, or on ranks that have a part each."""
    return observe(model, found, **asked).plan(codec, feedback=feedback)
