"""Codecs as text: whatever can be asked for is read from its own spelling, and what cannot is refused with a hint."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import SPELT
from narrowcast.calibration import recipes_by_kind
from narrowcast.calibration.recipes import spelt
from narrowcast.codecs import (
    PRESETS,
    AllocatedRecipe,
    CastCodec,
    Codec,
    FeatureRecipe,
    GroupCodec,
    MinifloatCodec,
    Ranges,
    Recipe,
    TransformRecipe,
    recipe,
)
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import KINDS

budgets = st.floats(0, 16, exclude_min=True)
fitted: dict[str, st.SearchStrategy[float | None]] = {"bits": st.none() | budgets, "target_kl": st.none()}
aimed: dict[str, st.SearchStrategy[float | None]] = {"bits": st.none(), "target_kl": budgets}
algorithms = st.sampled_from([None, "one_shot", "two_shot"])
recipes: st.SearchStrategy[Recipe] = st.one_of(
    st.builds(CastCodec, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    st.builds(
        FeatureRecipe,
        num_bits=st.integers(2, 8),
        num_outliers=st.none() | st.integers(0, 4096),
        choose=st.sampled_from(["range", "random"]),
    ),
    st.builds(
        GroupCodec, num_bits=st.integers(2, 8), group_size=st.sampled_from([32, 64, 128]), symmetric=st.booleans()
    ),
    st.builds(GroupCodec, num_bits=st.integers(2, 8), group_size=st.sampled_from([32, 64, 128]), spikes=st.booleans()),
    st.builds(
        MinifloatCodec,
        element=st.sampled_from(["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]),
        block_size=st.sampled_from([None, 16, 32, 64, 128]),
    ),
    *(st.builds(AllocatedRecipe, **each, algorithm=algorithms) for each in (fitted, aimed)),
    *(
        st.builds(TransformRecipe, **each, algorithm=algorithms, axes=st.sampled_from(["ranks", "site", "blocks"]))
        for each in (fitted, aimed)
    ),
    st.builds(TransformRecipe, axes=st.just("blocks"), block_size=st.integers(1, 4096)),
    st.sampled_from(list(PRESETS.values())),
)


@settings(max_examples=300, deadline=None)
@given(made=recipes)
def test_the_spelling_of_a_recipe_stands_for_it(made: Recipe) -> None:
    assert recipe(str(made)) == made
    assert str(recipe(str(made))) == str(made)
    assert recipe(str(made).replace(" ", "")) == made


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(by_kind=st.dictionaries(st.sampled_from(KINDS), recipes.filter(lambda made: hasattr(made, "row_nbytes"))))
def test_the_spelling_of_recipes_by_kind_stands_for_them(by_kind: Mapping[str, Recipe]) -> None:
    assert recipes_by_kind(spelt(by_kind)) == by_kind


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_their_names(name: str) -> None:
    assert str(PRESETS[name]) == name
    assert spelt(recipes_by_kind(name)) == name


def test_few_presets_have_names() -> None:
    """Someone who adds one here tells users that it is worth a look."""
    assert list(PRESETS) == [
        *("bf16", "fp8", "int8-feature", "int6-feature", "int4-feature", "int4", "int4-random"),
        *("int8-group128", "int4-group128", "int2-group32-spike", "int4-group32-sym", "mxfp4", "nvfp4"),
        *("allocated", "transform"),
    ]


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("feature(bits=3, outliers=8, choose=random)", FeatureRecipe(num_bits=3, num_outliers=8, choose="random")),
        ("group(bits=5, size=64)", GroupCodec(num_bits=5, group_size=64)),
        (" group( size = 64,bits=5 , symmetric=true)", GroupCodec(num_bits=5, group_size=64, symmetric=True)),
        ("minifloat(element=e5m2, size=128)", MinifloatCodec(element="e5m2", block_size=128)),
        ("cast(dtype=fp16)", CastCodec(dtype=torch.float16)),
        ("allocated(bits=2.5)", AllocatedRecipe(bits=2.5)),
        ("allocated()", PRESETS["allocated"]),
        ("transform(axes=site, target_kl=0.01)", TransformRecipe(axes="site", target_kl=0.01)),
    ],
)
def test_parameters_are_those_of_the_fields(text: str, made: Recipe) -> None:
    assert recipe(text) == made


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("int5-magic", r"found int5-magic\. See `narrowcast codecs`"),
        ("int4-feture", r"found int4-feture\. Did you mean int4-feature"),
        ("gruop(bits=5, size=64)", r"Did you mean group\?"),
        ("group", r"Spell it out: group\(bits=\.\.\., size=\.\.\., symmetric=\.\.\., spikes=\.\.\.\)"),
        ("int4-feature(outliers=8)", "expected a known name"),
        ("group(bits=5", "a name with parameters such as"),
        ("", "a name with parameters such as"),
        ("group(bits=5, width=64)", r"parameters of group, each once: bits, size, symmetric, spikes, found width=64"),
        ("group(bits=5, bits=6, size=64)", "each once.*found bits=6"),
        ("group(bits=5, sizes=64)", r"Did you mean size\b"),
        ("group(bits=5)", "expected size too, found bits=5"),
        ("group(5, 64)", "found 5"),
        ("group(bits=few, size=64)", r"^bits of codec .* expected a whole number, found few"),
        ("group(bits=, size=64)", "expected a whole number, found nothing"),
        ("group(bits=5, size=64, symmetric=yes)", "one of true, false, found yes"),
        ("group(bits=9, size=64)", "2 to 8 bits"),
        ("feature(bits=9)", "2 to 8 bits"),
        ("cast(dtype=fp64)", "one of bf16, fp16, fp32, found fp64"),
        ("transform(axes=sites)", r"one of ranks, site, blocks, found sites\. Did you mean site\?"),
        ("allocated(bits=nan)", "above 0, 16 at most, found nan"),
        ("allocated(bits=2, target_kl=0.1)", "one of them, found both"),
    ],
)
def test_what_stands_for_no_codec_is_refused_with_a_hint(text: str, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match) as refused:
        recipe(text)
    assert len(str(refused.value)) < 250  # no list of all names


def test_a_recipe_of_the_users_own_is_taken_as_it_is() -> None:
    class Own:
        def codec(self, ranges: Ranges) -> Codec:
            return CastCodec(dtype=torch.bfloat16)

    own = Own()
    assert recipe(own) is own
    assert recipes_by_kind(own)["sum"] is own


def test_every_format_is_spelt() -> None:
    assert {text.split("(")[0] for text in SPELT} == {"cast", "feature", "group", "minifloat", "allocated"}
