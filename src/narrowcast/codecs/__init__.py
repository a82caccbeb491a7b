"""Codecs: how a tensor becomes bytes and comes back. `CODECS` by id, `PRESETS` by the name users type."""

import torch

from narrowcast.codecs.base import Codec, Ranges, Recipe
from narrowcast.codecs.cast import CastCodec
from narrowcast.codecs.feature import FeatureCodec, FeatureRecipe
from narrowcast.errors import InvalidInputError

CODECS: dict[str, type[Codec]] = {codec.id: codec for codec in (CastCodec, FeatureCodec)}

PRESETS: dict[str, Recipe] = {
    "bf16": CastCodec(dtype=torch.bfloat16),
    "fp16": CastCodec(dtype=torch.float16),
    "fp32": CastCodec(dtype=torch.float32),
    "int2-feature": FeatureRecipe(num_bits=2),
    "int3-feature": FeatureRecipe(num_bits=3),
    "int4-feature": FeatureRecipe(num_bits=4),
    "int5-feature": FeatureRecipe(num_bits=5),
    "int6-feature": FeatureRecipe(num_bits=6),
    "int7-feature": FeatureRecipe(num_bits=7),
    "int8-feature": FeatureRecipe(num_bits=8),
    "int4": FeatureRecipe(num_bits=4, num_outliers=0),
    "int4-random": FeatureRecipe(num_bits=4, choose="random"),
}


def recipe(preset: str | Recipe) -> Recipe:
    """The preset's recipe, or the recipe that is given itself; InvalidInputError lists the names there are."""
    if not isinstance(preset, str):
        return preset
    if preset not in PRESETS:
        raise InvalidInputError(
            "codec preset", expected=f"one of {', '.join(PRESETS)}", found=preset, remedy="Choose one of them."
        )
    return PRESETS[preset]


__all__ = ["CODECS", "PRESETS", "CastCodec", "Codec", "FeatureCodec", "FeatureRecipe", "Ranges", "Recipe", "recipe"]
