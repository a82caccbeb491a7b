"""What a plan is asked to code, and how: presets, recipes, and recipes for a whole model, by kind of site."""

from collections.abc import Mapping
from dataclasses import replace

from narrowcast.calibrate.fitting import MODEL_RECIPES, ModelRecipe
from narrowcast.calibrate.moments import MomentsNeeded
from narrowcast.codecs import PRESETS, Recipe
from narrowcast.codecs import recipe as recipe_of_one
from narrowcast.errors import InvalidInputError
from narrowcast.split import KINDS, UNCODED

CodecByKind = str | Recipe | ModelRecipe | Mapping[str, str | Recipe | ModelRecipe]

# Beside sums that are fitted to the model: what travels once, with more at stake (docs/calibration.md).
OF_OTHER_KINDS = "int8-group128"


def recipe(codec: str | Recipe | ModelRecipe) -> Recipe | ModelRecipe:
    """What a name stands for; InvalidInputError lists the names there are."""
    if isinstance(codec, ModelRecipe):
        return codec
    return MODEL_RECIPES[codec] if isinstance(codec, str) and codec in MODEL_RECIPES else recipe_of_one(codec)


def recipes_by_kind(codec: CodecByKind) -> dict[str, Recipe | ModelRecipe]:
    """The recipe for each kind of site that is to be coded; InvalidInputError for names that there are not."""
    recipes = {kind: recipe(each) for kind, each in _by_kind(codec).items()}
    if misplaced := [kind for kind, each in recipes.items() if isinstance(each, ModelRecipe) and kind != "sum"]:
        raise InvalidInputError(
            "codec",
            expected="a preset that finds its ranges itself, as only sums are fitted to the whole model",
            found=f"{', '.join(MODEL_RECIPES)} for {misplaced[0]}",
            remedy=f"Use {OF_OTHER_KINDS}, say.",
        )
    return recipes


def _by_kind(codec: CodecByKind) -> Mapping[str, str | Recipe | ModelRecipe]:
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


def budgeted(codec: CodecByKind, bits: float | None, target_kl: float | None) -> CodecByKind:
    """`codec` with a budget for what is fitted to the whole model; InvalidInputError where nothing is."""
    if bits is None and target_kl is None:
        return codec
    of_sums = codec.get("sum") if isinstance(codec, Mapping) else codec
    chosen = None if of_sums is None else recipe(of_sums)
    if not isinstance(chosen, ModelRecipe):
        raise InvalidInputError(
            "bits and target KL",
            expected=f"a codec that is fitted to the whole model, {' or '.join(MODEL_RECIPES)}",
            found=f"{codec}, whose bits its name says" if codec in PRESETS else f"{codec}",
            remedy="Leave them out, or choose such a codec.",
        )
    asked = replace(chosen, bits=bits, target_kl=target_kl)
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
