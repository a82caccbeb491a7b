"""What a plan is asked to code, and how: presets, recipes, and recipes for a whole model, by kind of site."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from narrowcast.calibration.fit import MODEL_RECIPES, ModelRecipe
from narrowcast.calibration.moments import MomentsNeeded
from narrowcast.codecs import PRESETS, Recipe
from narrowcast.codecs import recipe as recipe_of_one
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import KINDS, UNCODED

CodecByKind = str | Recipe | ModelRecipe | Mapping[str, str | Recipe | ModelRecipe]

# Beside sums that are fitted to the model: what travels once, with more at stake (docs/calibration.md).
OF_OTHER_KINDS = "int8-group128"


def recipe(codec: str | Recipe | ModelRecipe) -> Recipe | ModelRecipe:
    """What a name stands for; InvalidInputError lists the names there are."""
    if isinstance(codec, ModelRecipe):
        return codec
    if not isinstance(codec, str):
        return recipe_of_one(codec)
    if codec not in MODEL_RECIPES and codec not in PRESETS:
        names = ", ".join((*PRESETS, *(name for name in MODEL_RECIPES if name not in PRESETS)))
        raise InvalidInputError("codec preset", expected=f"one of {names}", found=codec, remedy="Choose one of them.")
    return MODEL_RECIPES[codec] if codec in MODEL_RECIPES else recipe_of_one(codec)


def recipes_by_kind(codec: CodecByKind) -> dict[str, Recipe | ModelRecipe]:
    """The recipe for each kind of site that is to be coded; InvalidInputError for names that there are not."""
    recipes = {kind: recipe(each) for kind, each in by_kind(codec).items()}
    if misplaced := [kind for kind, each in recipes.items() if isinstance(each, ModelRecipe) and kind != "sum"]:
        raise InvalidInputError(
            "codec",
            expected="a preset that finds its ranges itself, as only sums are fitted to the whole model",
            found=f"{described(by_kind(codec)[misplaced[0]])} for {misplaced[0]}",
            remedy=f"Use {OF_OTHER_KINDS}, say.",
        )
    return recipes


def by_kind(codec: CodecByKind) -> Mapping[str, str | Recipe | ModelRecipe]:
    """What serves each kind of site that is to be coded; InvalidInputError for kinds that there are not."""
    if not isinstance(codec, Mapping):
        fitted = isinstance(recipe(codec), ModelRecipe)
        coded = [kind for kind in KINDS if kind not in UNCODED]
        return {kind: OF_OTHER_KINDS if fitted and kind != "sum" else codec for kind in coded}
    if unknown := codec.keys() - set(KINDS):
        raise InvalidInputError(
            "codec",
            expected=f"kinds of sites among {', '.join(KINDS)}",
            found=", ".join(sorted(unknown)),
            remedy="Name one of them.",
        )
    return codec


def asked_for(codec: CodecByKind, **options: Any) -> CodecByKind:
    """`codec` with those `options` of a `ModelRecipe` that are not None; InvalidInputError where it is none."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return codec
    if "bits" in given and "target_kl" in given:
        raise InvalidInputError(
            "bits and target KL", expected="one of them", found="both", remedy="Leave one out: each sets the other."
        )
    of_sums = codec.get("sum") if isinstance(codec, Mapping) else codec
    chosen = None if of_sums is None else recipe(of_sums)
    if not isinstance(chosen, ModelRecipe):
        raise InvalidInputError(
            ", ".join(given),
            expected=f"with a codec that is fitted to the whole model, {' or '.join(MODEL_RECIPES)}",
            found=f"with {codec}",
            remedy="Leave them out, or choose such a codec.",
        )
    if "form" in given and chosen.form == "features":
        raise InvalidInputError(
            "axes", expected="with codec transform", found="with codec allocated", remedy="Choose one of them."
        )
    if "block_size" in given and given.get("form", chosen.form) != "blocks":
        raise InvalidInputError(
            "block size", expected="with axes blocks", found="other axes", remedy="Leave it out, or choose blocks."
        )
    asked = replace(chosen, **given)
    return {**codec, "sum": asked} if isinstance(codec, Mapping) else asked


def moments_needed(codec: CodecByKind) -> MomentsNeeded:
    """What must be observed for it."""
    of_sums = recipes_by_kind(codec).get("sum")
    if not isinstance(of_sums, ModelRecipe):
        return "none"
    return "diagonal" if of_sums.form == "features" else "full"


def described(codec: CodecByKind) -> str | dict[str, str]:
    """What the plan says of it."""
    if isinstance(codec, Mapping):
        return {kind: str(described(each)) for kind, each in codec.items()}
    if isinstance(codec, ModelRecipe):
        named = {each.form: name for name, each in MODEL_RECIPES.items()}
        name = named.get(codec.form, f"transform by {codec.form}")
        asked = {"bits": codec.bits, "target_kl": codec.target_kl}
        return " ".join([name, *(f"{key}={value:g}" for key, value in asked.items() if value is not None)])
    return codec if isinstance(codec, str) else repr(codec)
