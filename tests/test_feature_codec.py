"""The paper's method: its bits, its choice of outliers, its layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats import FORMATS
from models import calibrated
from narrowcast.codecs import FeatureCodec, FeatureRecipe, Ranges, packing, recipe
from narrowcast.codecs.feature_reference import GUARD_MARK
from narrowcast.errors import InvalidInputError


def ones(num_sources: int, num_features: int) -> Tensor:
    return torch.ones(num_sources, num_features, dtype=torch.bfloat16)


def none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(("num_features", "bits"), [(64, 4.25), (256, 4.1875), (4096, 4.1875), (5120, 4.1875)])
def test_bits_a_value_of_the_paper(num_features: int, bits: float) -> None:
    """k = E // 64 of 16 bits, the rest of 4. (E = 64: 63 codes take 32 bytes; half a byte is padding.)"""
    codec, _ = calibrated("int4-feature", torch.randn(2, 8, num_features))
    assert 8 * codec.row_nbytes(num_features) / num_features == bits


def test_outliers_have_the_largest_range_summed_over_ranks() -> None:
    """Feature 3 leads on no rank, yet its sum is the largest."""
    x_RTE = torch.ones(2, 1, 64)
    x_RTE[0, 0, 1], x_RTE[1, 0, 2], x_RTE[:, 0, 3] = -10.0, 10.0, 8.0
    codec = FeatureRecipe(num_bits=4, num_outliers=1).codec(Ranges.of(x_RTE))
    assert codec.outliers.tolist() == [3]


def test_scales_reach_the_largest_value_and_no_further_than_rounding_needs() -> None:
    x_RTE = torch.randn(3, 50, 40) * torch.logspace(-6, 5, 40)
    codec = FeatureRecipe(num_bits=4).codec(Ranges.of(x_RTE))
    reach_RE = codec.scale.double() * 7
    largest_RE = x_RTE.abs().amax(dim=1).double()
    assert (reach_RE >= largest_RE * (1 - 2**-22)).all()  # the fp32 quotient by 7 may round down once
    assert (reach_RE <= largest_RE * (1 + 2**-7)).all()  # one unit in the last place of BF16


def test_selected_outliers_beat_none_and_random_ones_by_an_order_of_magnitude() -> None:
    """Planted as peers.md 1.2 describes a real model: 1.5 % of features, far beyond the others, always the same."""
    generator = torch.Generator().manual_seed(0)
    spread_E = torch.ones(512)
    planted = torch.randperm(512, generator=generator)[:8]
    spread_E[planted] = 400.0
    x_RTE = torch.randn(8, 400, 512, generator=generator) * spread_E * 0.01
    fresh_RTE = torch.randn(8, 200, 512, generator=generator) * spread_E * 0.01

    def rmse(preset: str) -> float:
        codec, _ = calibrated(preset, x_RTE)
        payloads = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(fresh_RTE)])
        return (codec.decode_sum(payloads) - fresh_RTE.sum(dim=0)).square().mean().sqrt().item()

    assert rmse("int4-feature") < rmse("int4") / 10
    assert rmse("int4-feature") < rmse("int4-random") / 10


def test_layout_outliers_first_then_halves_packed_with_halves() -> None:
    """docs/formats.md, by hand: six features, outliers 1 and 5, so that feature 4 takes the slot of 1."""
    codec = FeatureCodec(num_bits=4, scale=ones(1, 6), outliers=torch.tensor([1, 5]))
    payload = codec.encode(torch.tensor([[1.0, 2.0, -7.0, 7.0, 0.0, -2.0]]), source=0)
    two, minus_two = [0x00, 0x40], [0x00, 0xC0]  # BF16, little-endian
    slots = [1 + 8, 0 + 8, -7 + 8, 7 + 8]  # features 0, 4, 2, 3
    assert payload.tolist() == [[*two, *minus_two, slots[0] | slots[2] << 4, slots[1] | slots[3] << 4]]


@pytest.mark.parametrize("num_bits", range(2, 9))
@settings(max_examples=20, deadline=None)
@given(num_codes=st.integers(0, 70), num_tokens=st.integers(0, 3), seed=st.integers(0, 99))
def test_pack_and_unpack(num_bits: int, num_codes: int, num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**num_bits, (num_tokens, num_codes), dtype=torch.uint8, generator=generator)
    packed = packing.pack(codes, num_bits)
    assert packed.shape == (num_tokens, packing.packed_nbytes(num_codes, num_bits))
    assert packed.shape[1] <= -(-num_codes * num_bits // 8) + 2  # a partial byte for each plane but the first
    assert torch.equal(packing.unpack(packed, num_bits, num_codes), codes)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_every_code_is_reached_and_the_free_one_marks_what_is_not_finite(num_bits: int) -> None:
    largest = 2 ** (num_bits - 1) - 1
    values = torch.tensor([[*range(-largest, largest + 1), torch.nan]]).T
    codec = FeatureCodec(num_bits=num_bits, scale=ones(1, 1), outliers=none())
    payload = codec.encode(values, source=0)
    assert packing.unpack(payload, num_bits, 1).flatten().tolist() == [*range(1, 2**num_bits), 0]
    assert torch.equal(codec.decode(payload, source=0).nan_to_num(99), values.nan_to_num(99))


def test_rounding_is_half_to_even() -> None:
    codec = FeatureCodec(num_bits=4, scale=ones(1, 1), outliers=none())
    halves = torch.tensor([[0.5], [1.5], [2.5], [-0.5], [-1.5], [6.5], [7.5]])
    assert codec.decode(codec.encode(halves, source=0), source=0).flatten().tolist() == [0, 2, 2, 0, -2, 6, 7]


def test_a_mark_where_no_guard_fits_is_never_read_as_numbers() -> None:
    """Nothing writes it there: whoever receives such a token answers NaN for it, and for it alone."""
    codec = FeatureCodec(num_bits=4, scale=ones(1, 3), outliers=torch.tensor([1]))
    payload = codec.encode(torch.randn(2, 3), source=0)
    payload[1, 0], payload[1, 1] = GUARD_MARK & 0xFF, GUARD_MARK >> 8
    decoded = codec.decode(payload, source=0)
    assert decoded[0].isfinite().all()
    assert decoded[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_value_encodes_to_the_guards_mark(dtype: torch.dtype) -> None:
    """All 2**16 BF16 patterns, NaNs with every payload among them, in the first outlier's place."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codec = FeatureCodec(num_bits=4, scale=ones(1, 1), outliers=torch.tensor([0]))
    payload = codec.encode(patterns[:, None].to(dtype), source=0)
    marks = payload[:, 0].int() | payload[:, 1].int() << 8
    assert (marks != GUARD_MARK).all()


@pytest.mark.parametrize("num_features", [1, 2, 3, 63, 65, 129])
@pytest.mark.parametrize("num_outliers", [0, 1, 2, 3])
def test_any_number_of_outliers_in_any_place(num_features: int, num_outliers: int) -> None:
    if num_outliers > num_features:
        with pytest.raises(InvalidInputError, match="at most"):
            FeatureRecipe(num_bits=4, num_outliers=num_outliers).codec(Ranges.of(torch.ones(1, 1, num_features)))
        return
    for place in {0, num_features - num_outliers, (num_features - num_outliers) // 2}:
        outliers = torch.arange(place, place + num_outliers)
        codec = FeatureCodec(num_bits=8, scale=ones(1, num_features), outliers=outliers)
        x_TE = torch.arange(num_features, dtype=torch.float32)[None] % 100
        assert torch.equal(codec.decode(codec.encode(x_TE, source=0), source=0), x_TE)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_bits": 9}, "2 to 8 bits, found 9"),
        ({"scale": torch.ones(1, 4)}, "bf16"),
        ({"scale": torch.zeros(1, 4, dtype=torch.bfloat16)}, "positive"),
        ({"scale": torch.full((1, 4), torch.nan, dtype=torch.bfloat16)}, "finite"),
        ({"outliers": torch.tensor([2, 1])}, "ascending"),
        ({"outliers": torch.tensor([1, 1])}, "ascending"),
        ({"outliers": torch.tensor([4])}, "below 4"),
        ({"outliers": torch.tensor([-1])}, "ascending"),
    ],
)
def test_impossible_parameters_are_refused(fields: dict[str, object], match: str) -> None:
    sound = {"num_bits": 4, "scale": ones(1, 4), "outliers": torch.tensor([1])}
    with pytest.raises(InvalidInputError, match=match):
        FeatureCodec(**(sound | fields))  # type: ignore[arg-type]


def test_formats_cover_every_width() -> None:
    widths = {made.num_bits for made in map(recipe, FORMATS) if isinstance(made, FeatureRecipe)}
    assert widths == set(range(2, 9))
