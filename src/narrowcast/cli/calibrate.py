"""`narrowcast calibrate`: a model and text in, a plan out, in one process or on the ranks of the split model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from narrowcast.calibration import DEFAULT_FIRST_TOKENS, moments_needed, observe, recipes_by_kind
from narrowcast.calibration.observers import FirstTokens
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.cli import options
from narrowcast.cli.options import OUTPUT, SPLIT, TEXT, option
from narrowcast.cli.progress import calibrating
from narrowcast.codecs import Recipe
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.files import check_writable
from narrowcast.launch import is_first_rank, run
from narrowcast.plan import Plan
from narrowcast.transport import DEFAULT_TIMEOUT_S

OF_ONE_KIND = re.compile(r"\w+=")  # not allocated(bits=2)


def calibrate(
    model: options.ModelArgument,
    text: Annotated[Path, option(TEXT, "FILE", "To calibrate on.")],
    output: Annotated[Path, option(OUTPUT, "FILE", "The plan.", "-o", "--output")],
    tp: options.TensorParallel = options.DEFAULT_TP,
    pp: options.PipelineParallel = 1,
    experts: options.ExpertsOption = "slices",
    nnodes: Annotated[int, option(SPLIT, "N", "Sums go within nodes first.", min=1)] = 1,
    codec: options.CodecOption = [options.DEFAULT_CODEC],  # noqa: B006 (typer copies it)
    num_samples: options.NumSamples = options.DEFAULT_NUM_SAMPLES,
    max_seq_len: options.MaxSeqLen = DEFAULT_LENGTH,
    first_tokens: Annotated[FirstTokens, option(TEXT, "NAME", "count, choosing, or skip.")] = DEFAULT_FIRST_TOKENS,
    device: options.Device = "cpu",
    real: options.Real = False,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    overwrite: options.Overwrite = False,
) -> None:
    """Calibrate MODEL, split over -tp ranks and -pp stages, and write a plan.

    Form feeds split documents. --experts: slices of each on every rank, or whole ones (docs/integrations.md).
    """
    split, groups, chosen = options.checked_split(tp, pp, experts), _groups(tp, nnodes), codec_by_kind(codec)
    if is_first_rank():
        check_writable(output, overwrite=overwrite)
    asked = {**asdict(split), "groups": groups, "first_tokens": first_tokens, "moments": moments_needed(chosen)}
    if asked["moments"] != "none" and (real or groups):  # before the work, not after it
        raise InvalidInputError(
            "--codec",
            expected="one that is not fitted to the whole model, with --real or --nnodes",
            found=", ".join(codec),
            remedy="Leave --real and --nnodes out, or choose int4-feature, say.",
        )
    found = sequences(load_engine().load_tokenizer(model), text, length=max_seq_len, limit=num_samples)
    if real:
        plan = run(_plan, split.world_size, model, {"split": split}, found, chosen, asked, timeout_s=timeout)[0]
    else:
        plan = _plan(model, {"device": device}, found, chosen, asked)
    if is_first_rank():
        plan.save(output, overwrite=overwrite)
        number = f"{len(plan.sites)} site" + "s" * (len(plan.sites) != 1)
        typer.echo(f"{output}: {number}, {split}, {', '.join(codec)}{_fitted(plan)}, from {len(found)} sequences")


def codec_by_kind(asked: Sequence[str]) -> dict[str, Recipe]:
    """The recipes that `--codec` asks for: one codec for all kinds that are coded by default, others by kind."""
    single = dict(each.split("=", 1) for each in asked if OF_ONE_KIND.match(each))
    general = [each for each in asked if not OF_ONE_KIND.match(each)]
    if len(general) > 1 or len(general) + len(single) < len(asked):
        raise InvalidInputError(
            "--codec",
            expected="one codec for all kinds, and at most one for each kind",
            found=", ".join(asked),
            remedy="Use KIND=CODEC, once a kind.",
        )
    rest = general[0] if general else options.DEFAULT_CODEC
    return recipes_by_kind({**recipes_by_kind(rest), **single})


def _groups(tp_size: int, num_nodes: int) -> list[range]:
    if tp_size % num_nodes:
        raise InvalidInputError(
            "--nnodes", expected=f"a divisor of -tp {tp_size}", found=num_nodes, remedy="Choose another number."
        )
    size = tp_size // num_nodes
    return [range(node * size, (node + 1) * size) for node in range(num_nodes)] if num_nodes > 1 else []


def _plan(
    model: str, load: Mapping[str, Any], found: Sequence[Tensor], codec: Mapping[str, Recipe], asked: Mapping[str, Any]
) -> Plan:
    """The plan of a model that is loaded in this way: whole, or the part of this rank."""
    loaded = load_engine().load(model, **load)
    with calibrating(found) as progress:
        return observe(loaded, found, **asked, progress=progress).plan(codec)


def _fitted(plan: Plan) -> str:
    """The budget of a codec that is fitted to the whole model, and what it costs."""
    bits, kl = plan.calibration.get("bits"), plan.calibration.get("held_out_kl")
    told = "" if bits is None else f" at {bits:g} bits a value"
    return told if kl is None else f"{told}, KL {kl:.3g} on text that was held out"
