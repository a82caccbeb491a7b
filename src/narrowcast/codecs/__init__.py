"""Codecs: how a tensor becomes bytes and comes back. `CODECS` by id, `PRESETS` by the name that users type."""

from narrowcast.codecs.allocated import AllocatedCodec
from narrowcast.codecs.base import Codec
from narrowcast.codecs.cast import CastCodec
from narrowcast.codecs.feature import FeatureCodec, FeatureRecipe
from narrowcast.codecs.fitted import AllocatedRecipe, FittedRecipe, TransformRecipe
from narrowcast.codecs.group import GroupCodec
from narrowcast.codecs.minifloat import MinifloatCodec
from narrowcast.codecs.presets import CODECS, PRESETS, RECIPES, recipe
from narrowcast.codecs.recipes import Ranges, Recipe
from narrowcast.codecs.transform import TransformCodec

__all__ = [
    "CODECS",
    "PRESETS",
    "RECIPES",
    "AllocatedCodec",
    "AllocatedRecipe",
    "CastCodec",
    "Codec",
    "FeatureCodec",
    "FeatureRecipe",
    "FittedRecipe",
    "GroupCodec",
    "MinifloatCodec",
    "Ranges",
    "Recipe",
    "TransformCodec",
    "TransformRecipe",
    "recipe",
]
