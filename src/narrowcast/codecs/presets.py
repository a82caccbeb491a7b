"""The tables of codecs: by the id of their bytes, by the name that is spelt out, and by the names that users know."""

from collections.abc import Mapping

import torch

from narrowcast.codecs import spelling
from narrowcast.codecs.allocated import AllocatedCodec
from narrowcast.codecs.base import Codec
from narrowcast.codecs.cast import CastCodec
from narrowcast.codecs.feature import FeatureCodec, FeatureRecipe
from narrowcast.codecs.fitted import AllocatedRecipe, TransformRecipe
from narrowcast.codecs.group import GroupCodec
from narrowcast.codecs.minifloat import MinifloatCodec
from narrowcast.codecs.recipes import Recipe
from narrowcast.codecs.spelling import Spelt
from narrowcast.codecs.transform import TransformCodec
from narrowcast.errors import InvalidInputError

CODECS: dict[str, type[Codec]] = {
    codec.id: codec for codec in (CastCodec, FeatureCodec, GroupCodec, MinifloatCodec, AllocatedCodec, TransformCodec)
}

RECIPES: dict[str, type[Spelt]] = {
    recipe.id: recipe
    for recipe in (CastCodec, FeatureRecipe, GroupCodec, MinifloatCodec, AllocatedRecipe, TransformRecipe)
}

PRESETS: dict[str, Recipe] = {
    "bf16": CastCodec(dtype=torch.bfloat16),
    "fp8": MinifloatCodec(element="e4m3"),
    # arXiv 2411.07942, its range of bits; without outliers, and with random ones, as it compares with.
    "int8-feature": FeatureRecipe(num_bits=8),
    "int6-feature": FeatureRecipe(num_bits=6),
    "int4-feature": FeatureRecipe(num_bits=4),
    "int4": FeatureRecipe(num_bits=4, num_outliers=0),
    "int4-random": FeatureRecipe(num_bits=4, choose="random"),
    # Flash Communication, and its second version, which keeps each group's extremes as they are.
    "int8-group128": GroupCodec(num_bits=8, group_size=128),
    "int4-group128": GroupCodec(num_bits=4, group_size=128),
    "int2-group32-spike": GroupCodec(num_bits=2, group_size=32, spikes=True),
    # QuickReduce.
    "int4-group32-sym": GroupCodec(num_bits=4, group_size=32, symmetric=True),
    # OCP Microscaling, and NVIDIA's.
    "mxfp4": MinifloatCodec(element="e2m1", scale="e8m0", block_size=32),
    "nvfp4": MinifloatCodec(element="e2m1", scale="e4m3", block_size=16),
    # Fitted to the whole model.
    "allocated": AllocatedRecipe(),
    "transform": TransformRecipe(),
}


def recipe(codec: str | Recipe) -> Recipe:
    """The recipe that a preset's name or a spelling stands for, or the recipe that is given itself.

    InvalidInputError for text that stands for none.

    >>> str(recipe("group(bits=8, size=128, symmetric=false)"))
    'int8-group128'
    >>> str(recipe("feature(choose=random,bits=3)"))
    'feature(bits=3, choose=random)'
    """
    if not isinstance(codec, str):
        return codec
    name, arguments = spelling.split(codec)
    known: Mapping[str, object] = PRESETS if arguments is None else RECIPES
    if name not in known:
        raise InvalidInputError("codec", expected="a known name", found=codec, remedy=_remedy(name, known))
    return PRESETS[name] if arguments is None else _read(codec, name, arguments)


def _read(text: str, name: str, arguments: str) -> Recipe:
    made: Recipe = spelling.read(RECIPES[name], text, arguments)  # type: ignore[assignment]
    return made


def _remedy(name: str, known: Mapping[str, object]) -> str:
    if name in RECIPES:
        return f"Spell it out: {name}({', '.join(f'{each}=...' for each in spelling.parameters(RECIPES[name]))})."
    return spelling.nearest(name, known) or "See `narrowcast codecs`, or spell one out: group(bits=5, size=64)."
