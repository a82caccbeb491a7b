"""The fingerprint of a model: the same for the whole model and for any split of it."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from narrowcast.engines.identity import EMBEDDING, NUM_SAMPLES, config_fields, digest, sample_places
from narrowcast.engines.transformers.seam import summed
from narrowcast.engines.transformers.sharding import is_experts, is_linear, own_chunk, summed_weight
from narrowcast.plan import ModelFingerprint
from narrowcast.weights.experts import PackedExperts
from narrowcast.weights.layers import PackedEmbedding, PackedLinear, local


def fingerprint(model: nn.Module) -> ModelFingerprint:
    """Config fields; digests of columns of the weights whose outputs are summed and of rows of the embedding.

    Of a skeleton, which holds no weights, no sample is known.
    """
    config = cast(Any, model).config.get_text_config()
    known = {name: module for name, module in summed(model).items() if is_linear(module) or is_experts(module)}
    samples = {name: _digests_of(module) for name, module in known.items()}
    embedding = cast(Any, model).get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        samples[EMBEDDING] = _kept_digests(embedding.samples, embedding.num_embeddings)
    elif isinstance(embedding, nn.Embedding):  # not on every stage of a pipeline
        samples[EMBEDDING] = _digests(embedding.weight, dim=0)
    return ModelFingerprint(config=config_fields(config), samples=samples)


def sampled(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a model is told from others by, and its embedding, by name."""
    embedding = cast(Any, model).get_input_embeddings()
    known = {name: module for name, module in summed(model).items() if is_linear(module) or is_experts(module)}
    return known | {name: module for name, module in model.named_modules() if module is embedding}


def _digests_of(module: nn.Module) -> list[str | None]:
    if isinstance(module, PackedLinear):
        return _kept_digests(module.samples, module.in_features)
    if isinstance(module, PackedExperts):
        return _kept_digests(module.samples, module.num_hidden)
    return _digests(summed_weight(module), dim=-1)


def _kept_digests(samples: Mapping[int, str], size: int) -> list[str | None]:
    """Of what the loader has kept of weights in few bits, which is as the checkpoint has it."""
    return [samples.get(place) for place in sample_places(size)]


def _digests(weight: Tensor, dim: int) -> list[str | None]:
    """Digests in BF16 of slices at fixed places along `dim` (of experts: each from one expert)."""
    if weight.is_meta:
        return [None] * NUM_SAMPLES
    held = [own_chunk(weight, axis) for axis in range(weight.ndim)]
    digests: list[str | None] = []
    for sample, place in enumerate(sample_places(weight.shape[dim])):
        places = {dim % weight.ndim: place}
        if weight.ndim == 3:
            places[0] = sample % weight.shape[0]
        here = all(held[axis].start <= place < held[axis].stop for axis, place in places.items())
        digests.append(digest(_slice(local(weight), held, places)) if here else None)
    return digests


def _slice(held_part: Tensor, held: list[slice], places: dict[int, int]) -> Tensor:
    values = held_part.detach()
    for axis in sorted(places, reverse=True):
        values = values.select(axis, places[axis] - held[axis].start)
    return values
