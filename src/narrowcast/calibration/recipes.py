"""The door for codecs that are asked for: text, recipes, or either by kind of site, become recipes by kind."""

from collections.abc import Mapping

from narrowcast.calibration.moments import MomentsNeeded
from narrowcast.codecs import AllocatedRecipe, FittedRecipe, Recipe, recipe
from narrowcast.collectives import ALGORITHMS
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import KINDS, UNCODED

# A codec for all kinds of sites, or one for each kind that is to be coded.
CodecByKind = str | Recipe | Mapping[str, str | Recipe]

# The KL divergence in nats that nobody notices, and the codec that keeps below it where none is named: docs/quality.md.
DEFAULT_TARGET_KL = 0.01
DEFAULT_CODEC = AllocatedRecipe(target_kl=DEFAULT_TARGET_KL)

# Beside sums that are fitted to the model: what travels once, with more at stake (docs/calibration.md).
OF_OTHER_KINDS = "int8-group128"
# A kind beside those of sites: the last sum before the stream goes to another stage or out of the model, whose loss
# nothing makes good. Unless it is named, it is coded like what travels once, or like all sums if these have more bits.
LAST = "last"


def recipes_by_kind(codec: CodecByKind) -> dict[str, Recipe]:
    """The recipe for each kind of site that is to be coded, and, if it is named, for `LAST`.

    One for all leaves embedding and logits as they are, and, if it is fitted to the whole model, codes what are no sums
    by `OF_OTHER_KINDS`. InvalidInputError for unknown codecs and kinds, and for kinds that nothing can be fitted to.
    """
    if not isinstance(codec, Mapping):
        return _for_all(recipe(codec))
    if unknown := codec.keys() - {*KINDS, LAST}:
        raise InvalidInputError(
            "codec",
            expected=f"kinds of sites among {', '.join((*KINDS, LAST))}",
            found=", ".join(sorted(unknown)),
            remedy="Name one of them.",
        )
    recipes = {kind: recipe(each) for kind, each in codec.items()}
    for kind, each in recipes.items():
        _check_fittable(kind, each)
    if LAST in recipes and isinstance(recipes.get("sum", recipes[LAST]), FittedRecipe):
        raise InvalidInputError(
            "codec",
            expected=f"none for {LAST}, as fitted sums have bits by what each is worth",
            found=recipes[LAST],
            remedy="Leave it out.",
        )
    return recipes


def of_last(recipes: Mapping[str, Recipe]) -> Recipe:
    """The recipe of the last sum of a stream."""
    return recipes.get(LAST) or recipe(OF_OTHER_KINDS)


def moments_needed(recipes: Mapping[str, Recipe]) -> MomentsNeeded:
    """The second moments that must be observed for these recipes."""
    of_sums = recipes.get("sum")
    return of_sums.moments if isinstance(of_sums, FittedRecipe) else "none"


def spelt(recipes: Mapping[str, Recipe]) -> str | dict[str, str]:
    """The one codec that asks for all these recipes, or the codec of each kind; `recipes_by_kind` reads either."""
    of_sums = recipes.get("sum")
    if of_sums is not None and dict(recipes) == _for_all(of_sums):
        return str(of_sums)
    return {kind: str(each) for kind, each in recipes.items()}


def _for_all(chosen: Recipe) -> dict[str, Recipe]:
    others = recipe(OF_OTHER_KINDS) if isinstance(chosen, FittedRecipe) else chosen
    _check_fittable("sum", chosen)
    return {kind: chosen if kind == "sum" else others for kind in KINDS if kind not in UNCODED}


def _check_fittable(kind: str, chosen: Recipe) -> None:
    if not isinstance(chosen, FittedRecipe):
        return
    if kind != "sum":
        raise InvalidInputError(
            "codec",
            expected="one that finds its ranges itself, as only sums are fitted to the whole model",
            found=f"{chosen} for {kind}",
            remedy=f"Use {OF_OTHER_KINDS}, say.",
        )
    if chosen.algorithm not in (None, *ALGORITHMS):
        raise InvalidInputError(
            f"algorithm of {chosen}",
            expected=f"one of {', '.join(ALGORITHMS)}",
            found=chosen.algorithm,
            remedy="Choose one, or leave it out.",
        )
