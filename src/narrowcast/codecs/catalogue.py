"""The presets with what a choice among them turns on, as `narrowcast codecs` lists them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from narrowcast.codecs.fitted import FittedRecipe, TransformRecipe
from narrowcast.codecs.presets import PRESETS
from narrowcast.codecs.recipes import Ranges, Recipe
from narrowcast.codecs.spelling import Spelt, spelt_out

NUM_FEATURES = 4096


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A preset.

    `needs`: what calibration must see, "nothing", "ranges" or "the whole model". `bits_per_value`: of 4096 features.
    `plan_nbytes`: bytes in a plan for each site, hop and source of as many; None where the model decides.
    `product`: true where sums are multiplied by a matrix when they arrive.
    """

    name: str
    spelling: str
    bits_per_value: float
    needs: str
    plan_nbytes: int | None
    product: bool


def catalogue() -> Iterator[Entry]:
    """An entry for each preset, in their order."""
    for name, recipe in PRESETS.items():
        bits, plan_nbytes = _sizes(recipe)
        yield Entry(
            name=name,
            spelling=spelt_out(recipe) if isinstance(recipe, Spelt) else name,
            bits_per_value=bits,
            needs=_needs(recipe, plan_nbytes),
            plan_nbytes=plan_nbytes,
            product=isinstance(recipe, TransformRecipe),
        )


def _sizes(recipe: Recipe) -> tuple[float, int | None]:
    """Bits a value, and bytes of calibrated tensors."""
    if isinstance(recipe, TransformRecipe):
        return recipe.bits or recipe.default_bits, None
    codec = recipe.codec(Ranges.of(torch.ones(1, 1, NUM_FEATURES)))
    nbytes = sum(tensor.nbytes for tensor in codec.state()[1].values())
    return 8 * codec.row_nbytes(NUM_FEATURES) / NUM_FEATURES, nbytes


def _needs(recipe: Recipe, plan_nbytes: int | None) -> str:
    if isinstance(recipe, FittedRecipe):
        return "the whole model"
    return "ranges" if plan_nbytes else "nothing"
