"""Calibration: a model and text in, a plan out.

The method of arXiv 2411.07942: per rank and feature, the smallest and largest partial sum of each sequence,
averaged over sequences by exponential moving average. Sequences run one by one and without their padding, so
that neither the batch size nor the padding can change the plan.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from narrowcast.codecs import Codec, Ranges, Recipe, recipe
from narrowcast.collectives import ALGORITHMS, simulate
from narrowcast.errors import InvalidInputError
from narrowcast.integrations import Engine, check_detached, device_of, engine_of
from narrowcast.integrations.forwards import Reduce, split_virtually
from narrowcast.plan import Plan, Site

EMA_FACTOR = 0.01  # weight of each new sequence (gamma in peers' words; the first sequence initialises)

# How the first tokens of a sequence count, which can be many times larger than all others: "count" as every
# token does (the paper), for "choosing" the outliers but not for scales, or "skip" for both.
# The default was measured: docs/calibration.md.
FirstTokens = Literal["count", "choosing", "skip"]
DEFAULT_FIRST_TOKENS: FirstTokens = "count"
DEFAULT_NUM_FIRST = 4

NUM_ERROR_SEQUENCES = 4  # the first ones, run again to measure the error that the finished plan makes

Batch = Tensor | Mapping[str, Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tp_size: int,
    codec: str | Recipe = "int4-feature",
    first_tokens: FirstTokens = DEFAULT_FIRST_TOKENS,
    num_first: int = DEFAULT_NUM_FIRST,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Watch the partial sums that `tp_size` ranks of the whole `model` would make, and fit codecs to them.

    `batches`: token ids [B, T], or mappings with `input_ids` and, where there is padding, `attention_mask`.
    `codec`: a name from `narrowcast.PRESETS`, or a recipe such as `FeatureRecipe(num_bits=4, num_outliers=32)`.
    `first_tokens`: how the first `num_first` tokens of each sequence count: "count" for all (the paper), for
    "choosing" outliers but not for scales, or "skip" for both.
    `progress(n)` is called after each sequence with the number done.
    Raises InvalidInputError for a model or preset that cannot be served, and for text without tokens.
    """
    recipe(codec)
    seen = observe(model, batches, tp_size=tp_size, first_tokens=first_tokens, num_first=num_first, progress=progress)
    return seen.plan(codec)


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tp_size: int,
    first_tokens: FirstTokens = DEFAULT_FIRST_TOKENS,
    num_first: int = DEFAULT_NUM_FIRST,
    progress: Callable[[int], None] | None = None,
) -> "Observations":
    """The first half of `calibrate`, which one run over the text does for any number of codecs."""
    engine = engine_of(model)
    _check(engine, model, tp_size, first_tokens, num_first)
    layers = engine.row_parallel_layers(model)
    observers = {name: _Observer(first_tokens, num_first) for name in layers}
    head: list[Tensor] = []
    num_sequences = num_tokens = 0
    for ids in _sequences(batches, device_of(model)):
        _run(model, layers, tp_size, ids, lambda partials, name: observers[name].see(partials))
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
        tp_size=tp_size,
        ranges={name: observer.ranges(name) for name, observer in observers.items()},
        calibration=text | options,
        head=head,
    )


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What calibration saw: ranges by site and stage, and the first sequences to measure errors on."""

    model: nn.Module
    tp_size: int
    ranges: Mapping[str, Sequence[Ranges]]
    calibration: Mapping[str, Any]
    head: Sequence[Tensor]

    def plan(self, codec: str | Recipe) -> Plan:
        """The plan with this preset or recipe at every site."""
        chosen, engine = recipe(codec), engine_of(self.model)
        codecs = {name: tuple(chosen.codec(ranges) for ranges in stages) for name, stages in self.ranges.items()}
        errors = _errors(self.model, engine.row_parallel_layers(self.model), self.tp_size, self.head, codecs)
        return Plan(
            tp_size=self.tp_size,
            model=engine.fingerprint(self.model),
            calibration={"codec": codec if isinstance(codec, str) else repr(codec), **self.calibration},
            sites={name: Site(kind="sum", codecs=codecs[name], error=errors[name]) for name in codecs},
        )


def _check(engine: Engine, model: nn.Module, tp_size: int, first_tokens: str, num_first: int) -> None:
    ways = get_args(FirstTokens)
    if not isinstance(tp_size, int) or tp_size < 1 or num_first < 0 or first_tokens not in ways:
        raise InvalidInputError(
            "calibrate",
            expected=f"tp_size >= 1, num_first >= 0, first_tokens one of {', '.join(ways)}",
            found=f"{tp_size!r}, {num_first}, {first_tokens}",
            remedy="Choose other values.",
        )
    check_detached(model)
    if engine.tp_size(model) != 1:
        raise InvalidInputError(
            type(model).__name__,
            expected="a whole model",
            found=f"one split over {engine.tp_size(model)} ranks",
            remedy="Load it without distributed_config: calibration splits it virtually.",
        )


class _Observer:
    """Moving averages of a site's ranges, for the partial sums [R, E] and for their sum [1, E]."""

    def __init__(self, first_tokens: FirstTokens, num_first: int) -> None:
        self._first_choosing = num_first if first_tokens == "skip" else 0  # tokens left out in choosing outliers
        self._first_scale = 0 if first_tokens == "count" else num_first  # tokens left out in scales
        self._extremes: list[Tensor] = []

    def see(self, partials: Sequence[Tensor]) -> Tensor:
        """Count one sequence and add the partial sums up as an uncompressed model would."""
        total = _exact_sum(partials)
        stages = torch.stack([x[0] for x in partials]).float(), total.float()
        seen = [
            torch.cat([_extremes(x_RTE, self._first_choosing), _extremes(x_RTE, self._first_scale)]) for x_RTE in stages
        ]
        if self._extremes:
            seen = [old + EMA_FACTOR * (new - old) for old, new in zip(self._extremes, seen, strict=True)]
        self._extremes = seen
        return total

    def ranges(self, name: str) -> list[Ranges]:
        """Ranges for stage 0 and stage 1; InvalidInputError if the site gave values that are not finite."""
        for extremes in self._extremes:
            if not extremes.isfinite().all():
                raise InvalidInputError(
                    name,
                    expected="finite partial sums",
                    found="inf or nan",
                    remedy="Calibrate on other text, or load the model in bf16 rather than fp16.",
                )
        fields = "low", "high", "scale_low", "scale_high"
        return [Ranges(**dict(zip(fields, extremes, strict=True))) for extremes in self._extremes]


def _extremes(x_RTE: Tensor, num_left_out: int) -> Tensor:
    """Smallest and largest over tokens, stacked: [2, R, E]. A short sequence counts with its last token."""
    counted = x_RTE[:, min(num_left_out, x_RTE.shape[1] - 1) :]
    return torch.stack([counted.amin(dim=1), counted.amax(dim=1)])


def _exact_sum(partials: Sequence[Tensor]) -> Tensor:
    """The sum in fp32, in rank order, rounded once."""
    total = partials[0].float()
    for x in partials[1:]:
        total = total + x.float()
    return total.to(partials[0].dtype)


def _run(model: nn.Module, layers: Mapping[str, nn.Linear], tp_size: int, ids: Tensor, reduce: Reduce) -> None:
    training = [module for module in model.modules() if module.training]
    forwards = split_virtually(layers, tp_size, reduce)
    try:
        model.eval()  # no dropout
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    finally:
        forwards.restore()
        for module in training:
            module.training = True


def _errors(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    tp_size: int,
    sequences: Sequence[Tensor],
    codecs: Mapping[str, Sequence[Codec]],
) -> dict[str, dict[str, float]]:
    """Relative RMS error of each site's coded sum, all that comes before it being exact."""
    power = dict.fromkeys(layers, 0.0)
    noise = {name: dict.fromkeys(ALGORITHMS, 0.0) for name in layers}

    def compare(partials: Sequence[Tensor], name: str) -> Tensor:
        exact = _exact_sum([x.float() for x in partials])
        power[name] += exact.square().sum().item()
        for algorithm in ALGORITHMS:
            coded = simulate.all_reduce([x.float() for x in partials], codec=codecs[name], algorithm=algorithm)
            noise[name][algorithm] += (coded - exact).square().sum().item()
        return _exact_sum(partials)

    for ids in sequences:
        _run(model, layers, tp_size, ids, compare)
    return {
        name: {algorithm: (error / max(power[name], 1e-30)) ** 0.5 for algorithm, error in noise[name].items()}
        for name in layers
    }


def _sequences(batches: Iterable[Batch], device: torch.device) -> Iterator[Tensor]:
    """Token ids [T] of each sequence, without padding."""
    for batch in batches:
        ids, mask = _ids_and_mask(batch)
        for row, kept in itertools.zip_longest(ids, mask):
            sequence = row[kept.bool()]
            if len(sequence):
                yield sequence.to(device)


def _ids_and_mask(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Tensor | Mapping):
        raise _not_a_batch(repr(batch)[:60])
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor | None):
        raise _not_a_batch(f"{type(ids).__name__} and {type(mask).__name__}")
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise _not_a_batch(f"{list(ids.shape)}" + ("" if mask is None else f" and {list(mask.shape)}"))
    return ids, torch.ones_like(ids) if mask is None else mask


def _not_a_batch(found: str) -> InvalidInputError:
    return InvalidInputError(
        "calibration batches",
        expected="an iterable of tensors input_ids [B, T], or of mappings with them and attention_mask of that shape",
        found=found,
        remedy="Pass a list of what a tokenizer returns with return_tensors='pt'.",
    )
