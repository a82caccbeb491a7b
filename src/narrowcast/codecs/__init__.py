"""Codecs: how a tensor becomes bytes and comes back. `CODECS` by id, `PRESETS` by the name users type."""

import torch

from narrowcast.codecs.allocated import AllocatedCodec
from narrowcast.codecs.allocated_recipe import AllocatedRecipe
from narrowcast.codecs.base import Codec, Ranges, Recipe
from narrowcast.codecs.cast import CastCodec
from narrowcast.codecs.feature import FeatureCodec, FeatureRecipe
from narrowcast.codecs.group import GroupCodec
from narrowcast.codecs.minifloat import MinifloatCodec
from narrowcast.errors import InvalidInputError

CODECS: dict[str, type[Codec]] = {
    codec.id: codec for codec in (CastCodec, FeatureCodec, GroupCodec, MinifloatCodec, AllocatedCodec)
}

PRESETS: dict[str, Recipe] = {
    "bf16": CastCodec(dtype=torch.bfloat16),
    "fp16": CastCodec(dtype=torch.float16),
    "fp32": CastCodec(dtype=torch.float32),
    **{f"int{bits}-feature": FeatureRecipe(num_bits=bits) for bits in range(2, 9)},
    "int4": FeatureRecipe(num_bits=4, num_outliers=0),
    "int4-random": FeatureRecipe(num_bits=4, choose="random"),
    # Flash Communication: a step and a minimum for each group.
    **{
        f"int{bits}-group{size}": GroupCodec(num_bits=bits, group_size=size)
        for size in (32, 64, 128)
        for bits in range(2, 9)
    },
    # Flash Communication V2: each group's extremes kept as they are.
    **{
        f"int{bits}-group{size}-spike": GroupCodec(num_bits=bits, group_size=size, spikes=True)
        for size in (32, 64, 128)
        for bits in range(2, 5)
    },
    # QuickReduce.
    **{f"int{bits}-group32-sym": GroupCodec(num_bits=bits, group_size=32, symmetric=True) for bits in range(2, 9)},
    "fp8-e4m3-token": MinifloatCodec(element="e4m3"),
    "fp8-e5m2-token": MinifloatCodec(element="e5m2"),
    "fp8-e4m3-group128": MinifloatCodec(element="e4m3", block_size=128),
    "fp8-e5m2-group128": MinifloatCodec(element="e5m2", block_size=128),
    "fp4-e2m1-group32": MinifloatCodec(element="e2m1", block_size=32),
    # OCP Microscaling.
    "mxfp8": MinifloatCodec(element="e4m3", scale="e8m0", block_size=32),
    "mxfp8-e5m2": MinifloatCodec(element="e5m2", scale="e8m0", block_size=32),
    "mxfp6-e2m3": MinifloatCodec(element="e2m3", scale="e8m0", block_size=32),
    "mxfp6-e3m2": MinifloatCodec(element="e3m2", scale="e8m0", block_size=32),
    "mxfp4": MinifloatCodec(element="e2m1", scale="e8m0", block_size=32),
    "allocated": AllocatedRecipe(),
    "nvfp4": MinifloatCodec(element="e2m1", scale="e4m3", block_size=16),
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


__all__ = [
    "CODECS",
    "PRESETS",
    "AllocatedCodec",
    "AllocatedRecipe",
    "CastCodec",
    "Codec",
    "FeatureCodec",
    "FeatureRecipe",
    "GroupCodec",
    "MinifloatCodec",
    "Ranges",
    "Recipe",
    "recipe",
]
