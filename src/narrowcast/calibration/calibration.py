"""Calibration: a model and text in, a plan out.

The method of arXiv 2411.07942: per rank and feature, the smallest and largest partial sum of each sequence,
averaged over sequences by exponential moving average; what travels otherwise is treated alike, with one source.
Where sums feed back what they lose, a second run over the text sees what is coded then. Sequences run one by one and
without their padding, so that neither the batch size nor the padding can change the plan.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from narrowcast.attaching import check_detached, check_loaded
from narrowcast.calibration.batches import Batch, sequences
from narrowcast.calibration.build import Observations
from narrowcast.calibration.moments import (
    MomentObserver,
    Moments,
    MomentsNeeded,
    fisher_information,
    of_all_stages,
)
from narrowcast.calibration.observers import EMA_FACTOR, FirstTokens, PowerObserver, RangeObserver
from narrowcast.calibration.observing import observed, run
from narrowcast.calibration.recipes import DEFAULT_CODEC, CodecByKind, moments_needed, recipes_by_kind
from narrowcast.calibration.sensitivity import Sensitivity, sensitivities
from narrowcast.calibration.stream import chains_of
from narrowcast.codecs import Recipe, recipe
from narrowcast.collectives import checked_groups
from narrowcast.engines import Engine, device_of, engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.errors import CalibrationWarning, InvalidInputError
from narrowcast.launch import is_first_rank
from narrowcast.plan import Plan
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Experts, Split
from narrowcast.plan.summary import doubts
from narrowcast.progress import told
from narrowcast.transport import transports_of

DEFAULT_FIRST_TOKENS: FirstTokens = "count"
DEFAULT_NUM_FIRST = 4

# One of so many sequences, so many at most, and so many tokens of each judge what is made from the others.
HELD_OUT_SHARE, MAX_HELD_OUT, MAX_HELD_OUT_TOKENS = 4, 8, 256


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tp_size: int | None = None,
    pp_size: int = 1,
    experts: Experts = "slices",
    groups: Sequence[Sequence[int]] = (),
    codec: CodecByKind = DEFAULT_CODEC,
    within: str | Recipe = "bf16",
    first_tokens: FirstTokens = DEFAULT_FIRST_TOKENS,
    num_first: int = DEFAULT_NUM_FIRST,
    feedback: bool = True,
) -> Plan:
    """Watch what the ranks of `model` would send each other, and fit codecs to it.

    `model`: a whole one, which is taken as if it were split over `tp_size` ranks (and `pp_size` stages of layers;
    `experts` as in `Split`); or one that its engine has split, for which every rank calls this with the same text
    and ends with the same plan.
    `batches`: token ids [B, T], or mappings with `input_ids` and, where there is padding, `attention_mask`.
    `codec`: for all but embedding and logits, a name from `narrowcast.PRESETS`, one that is spelt out, such as
    "feature(bits=4, outliers=32)", or a recipe, which is any object with `codec(ranges)`; or a mapping that names one
    for each kind of site (`narrowcast.plan.split.KINDS`), what it leaves out being sent as it is, and for "last", the
    last sum before the stream leaves a stage or the model. "allocated" and "transform" are fitted to the sums of the
    whole model: "allocated(bits=2.5)" takes 2.5 bits a value on average, "transform(target_kl=0.01)" as few as keep the
    KL divergence from the uncompressed model, in nats, below that on sequences that are held out. By default that is
    "allocated" with a target that nobody notices.
    `groups`: the tensor-parallel ranks of each node, such as [[0, 1], [2, 3]], where links between nodes are slower:
    sums then go within nodes first, coded `within`, and between nodes in `codec` (the algorithm "hierarchical").
    `first_tokens`: how the first `num_first` tokens of each sequence count: "count" for all (the paper), for
    "choosing" outliers but not for scales, or "skip" for both.
    `feedback=False`: for serving without depth feedback; the plan then has none.
    Raises InvalidInputError for a model or codec that cannot be served, for text without tokens, and for a target that
    8 bits a value do not meet. Warns where the text is too short for the codec, and where a few of its tokens leave
    little of all others.
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
    )
    plan = seen.plan(recipes, within=of_nodes, feedback=feedback)
    if is_first_rank():
        for doubt in doubts(plan):
            warnings.warn(doubt, CalibrationWarning, stacklevel=2)
    return plan


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
) -> Observations:
    """The first half of `calibrate`, which one run over the text does for any number of codecs.

    `moments`: second moments, too, to fit codecs to the whole model: "diagonal" for `allocated`, "full" (with room for
    R + 2 matrices [E, E] a site, and gradients, so that the model must be whole) for transforms as well.
    """
    engine = engine_of(model)
    _check_options(first_tokens, num_first, moments)
    check_detached(model)
    check_loaded(model)
    split = _split(engine, model, tp_size, pp_size, experts)
    if moments == "full" and engine.split_of(model) != Split():
        raise InvalidInputError(
            type(model).__name__,
            expected="a whole model, of whose loss there are gradients",
            found=f"one split by {engine.split_of(model)}",
            remedy="Calibrate before it is split, or choose another codec, such as allocated.",
        )
    nodes, sites = checked_groups(groups, split.tp_size), engine.sites(model, split)
    found = list(sequences(batches, device_of(model)))
    if not found:
        raise InvalidInputError(
            "calibration text", expected="at least one sequence", found="none", remedy="Pass more text."
        )
    num_held_out = min(len(found) // HELD_OUT_SHARE, MAX_HELD_OUT)
    text, held_out = found[num_held_out:], found[:num_held_out] or found[:1]
    ranges = RangeObserver(first_tokens, num_first, nodes)
    num_left_out = 0 if first_tokens == "count" else num_first
    of_moments = MomentObserver(nodes, full=moments == "full", num_left_out=num_left_out)
    powers = PowerObserver(num_left_out)
    with observed([ranges, powers] if moments == "none" else [ranges, powers, of_moments], model, split):
        for ids in told(text, "calibrating"):
            run(model, ids)
    chains = _chains(model, split, text[0], sites)
    of_sums, tried = ({}, {}) if moments == "none" else _moments(model, split, of_moments, text, sites, chains)
    obstacle = engine.obstacle(model, split) if engine.split_of(model) == Split() else ""
    about: dict[str, Any] = {"simulated_only": obstacle} if obstacle else {}
    about |= {"num_sequences": len(text), "num_tokens": sum(map(len, text)), "num_held_out": num_held_out}
    if ruled := _of_all_stages(model, powers.ruled_by_few()):
        about["ruled_by_few"] = ruled
    return Observations(
        model=model,
        split=split,
        groups=nodes,
        chains=chains,
        ranges=ranges.ranges(sites),
        moments=of_sums,
        sensitivities=tried,
        first_tokens=first_tokens,
        num_first=num_first,
        text=text,
        held_out=[ids[:MAX_HELD_OUT_TOKENS] for ids in held_out],
        about={**about, "first_tokens": first_tokens, "num_first": num_first, "ema_factor": EMA_FACTOR},
    )


def _chains(model: nn.Module, split: Split, ids: Tensor, sites: Mapping[str, str]) -> Chains:
    if "sum" not in sites.values():
        return Chains()
    with evaluating(model):
        return chains_of(model, split, ids)


def _moments(
    model: nn.Module,
    split: Split,
    seen: MomentObserver,
    text: Sequence[Tensor],
    sites: Mapping[str, str],
    chains: Chains,
) -> tuple[dict[str, Moments], dict[str, Sensitivity]]:
    """Moments of the sums of all stages; and how much the loss minds errors in these, where that was tried."""
    means = of_all_stages(model, {name: each for name, each in seen.means().items() if sites[name] == "sum"})
    power = {site: total.diagonal(dim1=1, dim2=2) if seen.full else total for site, (_, total) in means.items()}
    tried = sensitivities(model, split, chains, power, text[0])
    fishers = {site: each.fed_back for site, each in tried.items()}
    if seen.full:
        with evaluating(model):
            fishers = fisher_information(model, told(text, "gradients"), means)
    moments = {
        site: Moments(partial=partial, total=total, fisher=fishers[site]) for site, (partial, total) in means.items()
    }
    return moments, tried


def _of_all_stages(model: nn.Module, sites: list[str]) -> list[str]:
    pp = transports_of(engine_of(model).groups(model))[1]
    if pp is None:
        return sites
    return [site for stage in pp.share(json.dumps(sites), "sharing sites") for site in json.loads(stage)]


def _check_options(first_tokens: str, num_first: int, moments: MomentsNeeded) -> None:
    ways = get_args(FirstTokens)
    if first_tokens == "choosing" and moments != "none":
        raise InvalidInputError(
            "first_tokens",
            expected="count or skip, as allocated and transform choose no outliers",
            found=first_tokens,
            remedy="Choose skip, or a codec of outliers, such as int4-feature.",
        )
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
