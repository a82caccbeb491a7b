"""Calibration: a model and text in, a plan out.

The method of arXiv 2411.07942: per rank and feature, the smallest and largest partial sum of each sequence,
averaged over sequences by exponential moving average; what travels otherwise is treated alike, with one source.
Sequences run one by one and without their padding, so that neither the batch size nor the padding can change the
plan.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from narrowcast.attach import check_detached
from narrowcast.calibration.batches import Batch, sequences
from narrowcast.calibration.build import Observations
from narrowcast.calibration.moments import MomentObserver, Moments, MomentsNeeded, fisher_information
from narrowcast.calibration.observers import EMA_FACTOR, FirstTokens, RangeObserver
from narrowcast.calibration.observing import Observer, observed, run
from narrowcast.calibration.recipes import CodecByKind, moments_needed, recipes_by_kind
from narrowcast.calibration.stream import chains_of
from narrowcast.codecs import Recipe, recipe
from narrowcast.collectives import checked_groups
from narrowcast.engines import Engine, device_of, engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Experts, Split

DEFAULT_FIRST_TOKENS: FirstTokens = "count"
DEFAULT_NUM_FIRST = 4

NUM_ERROR_SEQUENCES = 4  # the first ones, run again to measure the error that the finished plan makes
# One of so many sequences, and how many at most, judge what is fitted to the others.
HELD_OUT_SHARE, MAX_HELD_OUT = 4, 8


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tp_size: int | None = None,
    pp_size: int = 1,
    experts: Experts = "slices",
    groups: Sequence[Sequence[int]] = (),
    codec: CodecByKind = "int4-feature",
    within: str | Recipe = "bf16",
    first_tokens: FirstTokens = DEFAULT_FIRST_TOKENS,
    num_first: int = DEFAULT_NUM_FIRST,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Watch what the ranks of `model` would send each other, and fit codecs to it.

    `model`: a whole one, which is taken as if it were split over `tp_size` ranks (and `pp_size` stages of layers;
    `experts` as in `Split`); or one that its engine has split, for which every rank calls this with the same text
    and ends with the same plan.
    `batches`: token ids [B, T], or mappings with `input_ids` and, where there is padding, `attention_mask`.
    `codec`: for all but embedding and logits, a name from `narrowcast.PRESETS`, one that is spelt out, such as
    "feature(bits=4, outliers=32)", or a recipe, which is any object with `codec(ranges)`; or a mapping that names one
    for each kind of site (`narrowcast.plan.split.KINDS`), what it leaves out being sent as it is. "allocated" and
    "transform" are fitted to the sums of the whole model: "allocated(bits=2.5)" takes 2.5 bits a value on average,
    "transform(target_kl=0.01)" as few as keep the KL divergence from the uncompressed model, in nats, below that.
    `groups`: the tensor-parallel ranks of each node, such as [[0, 1], [2, 3]], where links between nodes are slower:
    sums then go within nodes first, coded `within`, and between nodes in `codec` (the algorithm "hierarchical").
    `first_tokens`: how the first `num_first` tokens of each sequence count: "count" for all (the paper), for
    "choosing" outliers but not for scales, or "skip" for both.
    `progress(n)` is called after each sequence with the number done.
    Raises InvalidInputError for a model or codec that cannot be served, and for text without tokens.
    """
    recipes, of_nodes = recipes_by_kind(codec), recipe(within)
    seen = observe(
        model,
        batches,
        tp_size=tp_size,
        pp_size=pp_size,
        experts=experts,
        groups=groups,
        first_tokens=first_tokens,
        num_first=num_first,
        moments=moments_needed(recipes),
        progress=progress,
    )
    return seen.plan(recipes, within=of_nodes)


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tp_size: int | None = None,
    pp_size: int = 1,
    experts: Experts = "slices",
    groups: Sequence[Sequence[int]] = (),
    first_tokens: FirstTokens = DEFAULT_FIRST_TOKENS,
    num_first: int = DEFAULT_NUM_FIRST,
    moments: MomentsNeeded = "none",
    progress: Callable[[int], None] | None = None,
) -> Observations:
    """The first half of `calibrate`, which one run over the text does for any number of codecs.

    `moments`: second moments, too, to fit codecs to the whole model: "diagonal" for `allocated`, "full" (with room for
    R + 2 matrices [E, E] a site) for transforms as well.
    """
    engine = engine_of(model)
    _check_options(first_tokens, num_first)
    check_detached(model)
    split = _split(engine, model, tp_size, pp_size, experts)
    nodes, sites = checked_groups(groups, split.tp_size), engine.sites(model, split)
    found = list(sequences(batches, device_of(model)))
    if not found:
        raise InvalidInputError(
            "calibration text", expected="at least one sequence", found="none", remedy="Pass more text."
        )
    num_held_out = 0 if moments == "none" else min(len(found) // HELD_OUT_SHARE, MAX_HELD_OUT)
    ranges = RangeObserver(first_tokens, num_first, nodes)
    of_moments = MomentObserver(full=moments == "full")
    num_done = itertools.count(1)
    fitted: list[Observer] = [ranges] if moments == "none" else [ranges, of_moments]
    for observers, some in (([ranges], found[:num_held_out]), (fitted, found[num_held_out:])):
        with observed(observers, model, split):
            for ids in some:
                run(model, ids)
                if progress is not None:
                    progress(next(num_done))
    text = {"num_sequences": len(found), "num_tokens": sum(map(len, found))}
    options = {"first_tokens": first_tokens, "num_first": num_first, "ema_factor": EMA_FACTOR}
    return Observations(
        model=model,
        split=split,
        groups=nodes,
        chains=_chains(model, split, found[0], sites),
        ranges=ranges.ranges(sites),
        calibration=text | options,
        head=found[:NUM_ERROR_SEQUENCES],
        held_out=found[:num_held_out] or found[:1],
        moments={} if moments == "none" else _moments(model, of_moments, found[num_held_out:], sites),
    )


def _chains(model: nn.Module, split: Split, ids: Tensor, sites: Mapping[str, str]) -> Chains:
    if "sum" not in sites.values():
        return Chains()
    with evaluating(model):
        return chains_of(model, split, ids)


def _moments(
    model: nn.Module, seen: MomentObserver, found: Sequence[Tensor], sites: Mapping[str, str]
) -> dict[str, Moments]:
    """Moments of sums, and of the loss's gradient in them, for which the model must be whole."""
    engine = engine_of(model)
    if engine.split_of(model) != Split():
        raise InvalidInputError(
            type(model).__name__,
            expected="a whole model, of whose loss there are gradients",
            found=f"one split by {engine.split_of(model)}",
            remedy="Calibrate before it is split, or choose a codec such as int4-feature.",
        )
    sums = [name for name, kind in sites.items() if kind == "sum"]
    with evaluating(model):
        return seen.moments(fisher_information(model, found, sums, full=seen.full))


def _check_options(first_tokens: str, num_first: int) -> None:
    ways = get_args(FirstTokens)
    if num_first < 0 or first_tokens not in ways:
        raise InvalidInputError(
            "calibrate",
            expected=f"num_first >= 0, first_tokens one of {', '.join(ways)}",
            found=f"{num_first}, {first_tokens}",
            remedy="Choose other values.",
        )


def _split(engine: Engine, model: nn.Module, tp_size: int | None, pp_size: int, experts: Experts) -> Split:
    """The split that was asked for, by which a model that is split already must be."""
    found = engine.split_of(model)
    asked = Split(tp_size=1 if tp_size is None else tp_size, pp_size=pp_size, experts=experts)
    if found == Split():
        if asked.world_size == 1:
            raise InvalidInputError(
                "calibrate", expected="tp_size or pp_size above 1", found="one rank", remedy="Pass tp_size=2, say."
            )
        return asked
    if tp_size is not None and asked != found:
        raise InvalidInputError(
            type(model).__name__,
            expected=f"a model split as asked for, {asked}, or a whole one",
            found=f"one split by {found}",
            remedy="Leave tp_size out, or load the model otherwise.",
        )
    return found
