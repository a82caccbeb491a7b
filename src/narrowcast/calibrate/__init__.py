"""Calibration: a model and text in, a plan out.

The method of arXiv 2411.07942: per rank and feature, the smallest and largest partial sum of each sequence,
averaged over sequences by exponential moving average; what travels otherwise is treated alike, with one source.
Sequences run one by one and without their padding, so that neither the batch size nor the padding can change the
plan.
"""

import base64
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from narrowcast.calibrate.batches import Batch, sequences
from narrowcast.calibrate.gathering import GatheringCommunicator
from narrowcast.calibrate.observers import EMA_FACTOR, ErrorObserver, FirstTokens, RangeObserver
from narrowcast.codecs import Codec, Ranges, Recipe, recipe
from narrowcast.collectives import checked_groups
from narrowcast.errors import InvalidInputError
from narrowcast.integrations import Engine, check_detached, device_of, engine_of, transports_of
from narrowcast.integrations.base import Groups, Wires
from narrowcast.plan import ModelFingerprint, Plan, Site
from narrowcast.split import KINDS, UNCODED, Experts, Split

DEFAULT_FIRST_TOKENS: FirstTokens = "count"
DEFAULT_NUM_FIRST = 4

NUM_ERROR_SEQUENCES = 4  # the first ones, run again to measure the error that the finished plan makes

CodecByKind = str | Recipe | Mapping[str, str | Recipe]


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
    `codec`: a name from `narrowcast.PRESETS`, or a recipe such as `FeatureRecipe(num_bits=4, num_outliers=32)`, for
    all but embedding and logits; or a mapping that names one for each kind of site (`narrowcast.split.KINDS`), what
    it leaves out being sent as it is.
    `groups`: the tensor-parallel ranks of each node, such as [[0, 1], [2, 3]], where links between nodes are slower:
    sums then go within nodes first, coded `within`, and between nodes in `codec` (the algorithm "hierarchical").
    `first_tokens`: how the first `num_first` tokens of each sequence count: "count" for all (the paper), for
    "choosing" outliers but not for scales, or "skip" for both.
    `progress(n)` is called after each sequence with the number done.
    Raises InvalidInputError for a model or preset that cannot be served, and for text without tokens.
    """
    recipes_by_kind(codec), recipe(within)
    seen = observe(
        model,
        batches,
        tp_size=tp_size,
        pp_size=pp_size,
        experts=experts,
        groups=groups,
        first_tokens=first_tokens,
        num_first=num_first,
        progress=progress,
    )
    return seen.plan(codec, within=within)


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
    progress: Callable[[int], None] | None = None,
) -> "Observations":
    """The first half of `calibrate`, which one run over the text does for any number of codecs."""
    engine = engine_of(model)
    _check_options(first_tokens, num_first)
    check_detached(model)
    split = _split(engine, model, tp_size, pp_size, experts)
    nodes, sites = checked_groups(groups, split.tp_size), engine.sites(model, split)
    observer = RangeObserver(first_tokens, num_first, nodes)
    head: list[Tensor] = []
    num_sequences = num_tokens = 0
    with _travelling_over(observer, model, split):
        for ids in sequences(batches, device_of(model)):
            _run(model, ids)
            num_sequences, num_tokens = num_sequences + 1, num_tokens + len(ids)
            head += [ids] if len(head) < NUM_ERROR_SEQUENCES else []
            if progress is not None:
                progress(num_sequences)
    if not num_sequences:
        raise InvalidInputError(
            "calibration text", expected="at least one sequence", found="none", remedy="Pass more text."
        )
    text = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    options = {"first_tokens": first_tokens, "num_first": num_first, "ema_factor": EMA_FACTOR}
    return Observations(
        model=model,
        split=split,
        groups=nodes,
        ranges=observer.ranges(sites),
        calibration=text | options,
        head=head,
    )


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What calibration saw: ranges by site and stage, and the first sequences to measure errors on."""

    model: nn.Module
    split: Split
    groups: tuple[tuple[int, ...], ...]
    ranges: Mapping[str, Sequence[Ranges]]
    calibration: Mapping[str, Any]
    head: Sequence[Tensor]

    def plan(self, codec: CodecByKind, *, within: str | Recipe = "bf16") -> Plan:
        """The plan with this preset or recipe at every site, or with one for each kind; `within` serves in nodes."""
        recipes, engine = recipes_by_kind(codec), engine_of(self.model)
        kinds = {name: kind for name, kind in engine.sites(self.model, self.split).items() if kind in recipes}
        if not kinds and engine.split_of(self.model).pp_size == 1:  # another stage may have some
            raise InvalidInputError(
                "codec",
                expected=f"one for {' or '.join(sorted(set(engine.sites(self.model, self.split).values())))}",
                found=f"codecs for {', '.join(recipes) or 'nothing'}",
                remedy="Name a kind of site that this model has, such as codec={'logits': 'int8-group128'}.",
            )
        codecs = {name: self._codecs(name, recipes[kind], recipe(within)) for name, kind in kinds.items()}
        observer = ErrorObserver(codecs, self.groups)
        with _travelling_over(observer, self.model, self.split):
            for ids in self.head:
                _run(self.model, ids)
        errors = observer.errors()
        plan = Plan(
            split=self.split,
            groups=self.groups,
            model=engine.fingerprint(self.model),
            calibration={"codec": _described(codec), **self.calibration},
            sites={name: Site(kind=kinds[name], codecs=codecs[name], error=errors.get(name, {})) for name in codecs},
        )
        return plan if engine.split_of(self.model) == Split() else _merged(plan, engine.groups(self.model))

    def _codecs(self, name: str, chosen: Recipe, within: Recipe) -> tuple[Codec, ...]:
        """By stage: the ranks' values, their sum, and the sums of nodes."""
        partial, *sums = self.ranges[name]
        if len(sums) < 2:
            return tuple(chosen.codec(seen) for seen in (partial, *sums))
        total, of_nodes = sums
        return within.codec(partial), within.codec(total), chosen.codec(of_nodes)


def recipes_by_kind(codec: CodecByKind) -> dict[str, Recipe]:
    """The recipe for each kind of site that is to be coded; InvalidInputError for names that there are not."""
    return {kind: recipe(each) for kind, each in _by_kind(codec).items()}


def _by_kind(codec: CodecByKind) -> Mapping[str, str | Recipe]:
    if not isinstance(codec, Mapping):
        return dict.fromkeys((kind for kind in KINDS if kind not in UNCODED), codec)
    if unknown := codec.keys() - set(KINDS):
        raise InvalidInputError(
            "codec",
            expected=f"kinds of sites among {', '.join(KINDS)}",
            found=", ".join(sorted(unknown)),
            remedy="Name one of them.",
        )
    return codec


def _merged(plan: Plan, groups: Groups) -> Plan:
    """What the plans of all ranks know together: of weights that others hold, and of sites at other stages."""
    for transport in transports_of(groups):
        if transport is not None:
            texts = transport.share(base64.b85encode(plan.to_bytes()).decode(), "merging plans")
            plans = [Plan.from_bytes(base64.b85decode(text), "of another rank") for text in texts]
            sites = {name: site for each in plans for name, site in each.sites.items()}
            model = functools.reduce(ModelFingerprint.merged, [each.model for each in plans])
            plan = dataclasses.replace(plan, model=model, sites=sites)
    return plan


def _described(codec: CodecByKind) -> str | dict[str, str]:
    if isinstance(codec, Mapping):
        return {kind: str(_described(each)) for kind, each in codec.items()}
    return codec if isinstance(codec, str) else repr(codec)


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
    """What was asked for, which a model that is split already must be."""
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


@contextmanager
def _travelling_over(wires: Wires, model: nn.Module, split: Split) -> Iterator[None]:
    """Let the values of all ranks travel over `wires`: of a whole model, or gathered from those of a split one."""
    engine = engine_of(model)
    if engine.split_of(model) == Split():
        forwards = engine.split_virtually(model, split, wires)
    else:
        transports = transports_of(engine.groups(model))
        forwards = engine.take_over(model, GatheringCommunicator(wires, *transports, device=device_of(model)))
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()  # no dropout
        yield
    finally:
        forwards.restore()
        for module in training:
            module.training = True


def _run(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
