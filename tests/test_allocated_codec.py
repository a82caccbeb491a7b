"""Bits by block of features and a scale for each token: the format, its quantizers, its guard, who gets which bits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.codecs import AllocatedCodec, AllocatedRecipe, Ranges, kernels, token_scale, trellis
from narrowcast.codecs.allocation import Entry, allocate, in_blocks
from narrowcast.codecs.base import GUARDED
from narrowcast.codecs.fitted import fitted
from narrowcast.errors import InvalidInputError

FAR = 100.0  # times what was calibrated


def of_widths(*widths: int, num_features: int) -> AllocatedCodec:
    """One source, all scales 1, features in order."""
    return AllocatedCodec(
        scale=torch.ones(1, num_features, dtype=torch.bfloat16),
        order=torch.arange(num_features, dtype=torch.int32)[None],
        widths=torch.tensor([widths], dtype=torch.uint8),
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- The format ------------------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    """docs/formats.md: the scale's code, then 32 codes of two bits, quarters packed with each other."""
    codec = of_widths(2, num_features=10)
    x_TE = torch.tensor([[1.0, -1.0, 0.1, 3.0, 0, 0, 0, 0, -3.0, 0.0]])
    # Mean square (1 + 1 + 0.01 + 9 + 9) / 10 = 2.001: half an octave above one in values, 127 + 4. Over 2 ** 0.5, only
    # 3 and -3 lie beyond 0.98, the middle between the levels 0.45 and 1.51 of first values. In ascending order these
    # have the codes 0, 2, 1, 3, the path bit being the higher one. Then come zeros: 0.17 in subset 0, or after a path
    # bit of one -0.17 in subset 3.
    first, then = [1, 2, 1, 3, 1, 1, 1, 1, 0, 1, *[1] * 6], [1, 2, 1, 2, *[1] * 12]
    codes = [first[:8], first[8:], then[:8], then[8:]]
    assert codec.encode(x_TE, source=0).tolist() == [
        [131, *(a | b << 2 | c << 4 | d << 6 for a, b, c, d in zip(*codes, strict=True))]
    ]


def test_three_bits_are_two_planes_and_bf16_goes_first() -> None:
    codec = of_widths(16, 3, num_features=64)
    x_TE = torch.zeros(1, 64)
    x_TE[0, 0], x_TE[0, 31] = 1.0, -2.0
    x_TE[0, 32:] = torch.tensor([-1.0, 1.0]).repeat(16)
    row = codec.encode(x_TE, source=0)[0].tolist()
    assert len(row) == codec.row_nbytes(64) == 1 + 64 + 12
    assert row[:1] == [127]  # a mean square of 1
    assert row[1:3] + row[63:65] == [0x80, 0x3F, 0x00, 0xC0]
    # -1 and 1 are first values of 0.756: the third and the sixth of eight levels, whose codes are 1 and 6. So the path
    # bit of even lanes is 0, of odd ones 1: after that -1 is 0.778 in subset 0, its second, and 1 in subset 3, with a
    # path bit of 1 its third. The two low bits of codes, then their highest ones, 8 slots apart.
    assert row[65:73] == [0b01010101, 0b10101010] * 4
    assert row[73:] == [0x00, 0xFF] * 2
    decoded = codec.decode(torch.tensor([row], dtype=torch.uint8), source=0)
    assert decoded[0, 0] == 1.0 and decoded[0, 31] == -2.0
    assert torch.equal(decoded[0, 32:48], x_TE[0, 32:48] * 3097 / 4096)
    assert torch.equal(decoded[0, 48:], x_TE[0, 48:] * 3186 / 4096)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_kernels_agree_on_edges(num_bits: int) -> None:
    """Values on the edges of a subset, which all kernels count alike; token scale 1, as the others see to."""
    codec = of_widths(*[num_bits] * 512, num_features=2**14)
    rows = []
    for subset in (*trellis.subsets(trellis.levels(num_bits)), *trellis.subsets(trellis.first_levels(num_bits))):
        edges = (subset[1:] + subset[:-1]) / 2
        for place in (0, 16, 4000):
            rows.append(torch.ones(2**14))
            rows[-1][place : place + len(edges)] = edges
    payloads = []
    for path in kernels.available():
        with kernels.forced(path):
            payloads.append(codec.encode(torch.stack(rows), source=0))
    assert (payloads[0][:, 0] == 127).all()
    assert all(torch.equal(each, payloads[0]) for each in payloads)


def test_features_take_slots_by_order_and_what_has_no_bits_decodes_to_zero() -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int()[None]
    widths = torch.tensor([[8, 4, 0]], dtype=torch.uint8)
    codec = AllocatedCodec(scale=torch.ones(1, 96, dtype=torch.bfloat16), order=order, widths=widths)
    x_TE = random(5, 96).clamp(-3, 3)
    decoded_TE = codec.decode(codec.encode(x_TE, source=0), source=0)
    error_TE = (decoded_TE - x_TE).abs()[:, order[0].long()]
    assert error_TE[:, :32].max() < 0.1 < error_TE[:, 32:64].max() < 0.4
    assert (decoded_TE[:, order[0, 64:].long()] == 0).all()


def test_rows_of_all_sources_take_as_many_bytes_as_the_longest() -> None:
    widths = torch.tensor([[5, 1], [2, 2]], dtype=torch.uint8)
    codec = fitted(torch.ones(2, 40), widths)
    assert codec.row_nbytes(40) == 1 + 4 * 6
    assert codec.encode(random(3, 40), source=1)[:, 1 + 4 * 4 :].count_nonzero() == 0


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"scale": torch.ones(1, 40)}, "bf16"),
        ({"scale": torch.zeros(1, 40, dtype=torch.bfloat16)}, "positive"),
        ({"order": torch.zeros(1, 40, dtype=torch.int32)}, "order of 40 features"),
        ({"order": torch.arange(40)[None]}, "int32"),
        ({"widths": torch.tensor([[1, 2]], dtype=torch.uint8)}, "falling"),
        ({"widths": torch.tensor([[9, 2]], dtype=torch.uint8)}, "0 to 8 or 16"),
        ({"widths": torch.tensor([[2]], dtype=torch.uint8)}, r"\[1, 2\]"),
    ],
)
def test_impossible_parameters_are_refused(fields: dict[str, Tensor], match: str) -> None:
    codec = of_widths(2, 1, num_features=40)
    sound = {"scale": codec.scale, "order": codec.order, "widths": codec.widths}
    AllocatedCodec(**sound)
    with pytest.raises(InvalidInputError, match=match):
        AllocatedCodec(**(sound | fields))


# --- Scales of tokens -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(octaves=st.floats(-40, 40))
def test_a_tokens_scale_is_the_nearest_of_eight_an_octave(octaves: float) -> None:
    mean_square = torch.tensor([2.0**octaves])
    exact = 127 + 8 * math.log2(math.sqrt(mean_square.item()))
    if abs(exact % 1 - 0.5) < 1e-4:
        return  # a tie, but for rounding
    assert token_scale.scale_code(mean_square).tolist() == [min(max(round(exact), 1), 253)]


def test_scales_reach_from_zero_over_16_octaves_to_each_side() -> None:
    codes = token_scale.scale_code(torch.tensor([0.0, 1e-45, 1.0, math.inf]))
    assert codes.tolist() == [0, 1, 127, 253]
    assert token_scale.TOKEN_SCALES.on(torch.device("cpu")).scales[codes].tolist() == pytest.approx(
        [0, 2**-15.75, 1, 2**15.75]
    )


@pytest.mark.parametrize("num_values", [1, 31, 32, 33, 100, 1025])
def test_the_mean_square_is_taken_in_the_stated_order(num_values: int) -> None:
    """Number by number; another order gives other bits."""
    u_TN = random(10, num_values, seed=num_values) * torch.exp2(random(10, num_values))
    sums = [torch.zeros(10) for _ in range(32)]
    for place, value in enumerate(u_TN.T):
        sums[place % 32] = sums[place % 32] + value * value
    for half in (16, 8, 4, 2, 1):
        sums = [sums[place] + sums[place + half] for place in range(half)]
    expected = sums[0] * (torch.ones(()) / num_values)
    assert torch.equal(token_scale.mean_square(u_TN), expected)


def test_without_bits_values_are_clipped_only_beyond_what_was_calibrated() -> None:
    codec = fitted(torch.ones(1, 40), torch.zeros(1, 2, dtype=torch.uint8))
    x_TE, stats = random(5, 40).clamp(-3, 3), torch.zeros(3, dtype=torch.int64)
    x_TE[2, 7] = 1e5
    assert not codec.decode(codec.encode(x_TE, source=0, stats=stats), source=0).any()
    assert stats.tolist() == [1, 0, 0]


# --- The guard -------------------------------------------------------------------------------------------------------


def planted(num_far: int, features: slice) -> tuple[AllocatedCodec, Tensor]:
    """A codec of 2 bits a value whose last block has none, and tokens with values far out at some of `features`."""
    spread_E = torch.exp2(-torch.arange(1024) / 256)
    codec = AllocatedRecipe(bits=2).codec(Ranges.of(random(1, 200, 1024) * spread_E))
    order = codec.order[0].long()
    assert codec.widths[0, 0] > 2 and codec.widths[0, -1] == 0
    x_TE = random(8, 1024, seed=1) * spread_E
    x_TE[:, order[features][:num_far]] = FAR * spread_E[order[features][:num_far]]
    return codec, x_TE


def relative_error(codec: AllocatedCodec, x_TE: Tensor) -> float:
    decoded_TE = codec.decode(codec.encode(x_TE, source=0), source=0)
    return ((decoded_TE - x_TE).norm() / x_TE.norm()).item()


@pytest.mark.parametrize("num_far", [1, 3])
@pytest.mark.parametrize("features", [slice(0, 1024), slice(992, 1024)], ids=["first", "without bits"])
def test_far_values_travel_as_they_are(num_far: int, features: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard, one such value takes the token's scale with it, or is not sent at all."""
    codec, x_TE = planted(num_far, features)
    stats = torch.zeros(3, dtype=torch.int64)
    far = codec.order[0, features][:num_far].long()
    decoded_TE = codec.decode(codec.encode(x_TE, source=0, stats=stats), source=0)
    assert stats.tolist() == [0, 0, 8]
    assert torch.equal(decoded_TE[:, far], x_TE[:, far].bfloat16().float())
    found = relative_error(codec, x_TE)
    assert found < (0.05 if features.start == 0 else 0.3)
    monkeypatch.setattr(AllocatedCodec, "num_escapes", 0)
    codec, x_TE = planted(num_far, features)
    stats.zero_()
    codec.encode(x_TE, source=0, stats=stats)
    assert stats.tolist() == [8 * num_far, 0, 0]
    assert relative_error(codec, x_TE) > (0.8 if features.start == 0 else 1.5 * found)


def test_many_far_values_are_the_tokens_scale() -> None:
    """A tenth of the features: none is eight times as large as their root mean square, and the others hardly count."""
    codec, x_TE = planted(102, slice(0, 1024))
    stats = torch.zeros(3, dtype=torch.int64)
    codec.encode(x_TE, source=0, stats=stats)
    assert stats.tolist() == [0, 0, 0]
    assert relative_error(codec, x_TE) < 0.2


def test_a_token_that_is_large_in_all_features_needs_no_guard() -> None:
    """Its scale says so."""
    codec, x_TE = planted(0, slice(0, 1024))
    stats = torch.zeros(3, dtype=torch.int64)
    codec.encode(x_TE * FAR, source=0, stats=stats)
    assert stats.tolist() == [0, 0, 0]
    assert relative_error(codec, x_TE * FAR) == pytest.approx(relative_error(codec, x_TE), rel=0.05)


def test_far_values_sent_in_bf16_need_no_guard() -> None:
    codec = of_widths(16, 4, 4, num_features=96)
    x_TE, stats = random(4, 96).clamp(-3, 3), torch.zeros(3, dtype=torch.int64)
    near_TE = codec.decode(codec.encode(x_TE, source=0), source=0)
    x_TE[:, 5] = FAR
    decoded_TE = codec.decode(codec.encode(x_TE, source=0, stats=stats), source=0)
    assert stats.tolist() == [0, 0, 0]
    assert (decoded_TE[:, 5] == FAR).all() and torch.equal(decoded_TE[:, 32:], near_TE[:, 32:])


def test_the_farthest_values_go_first_where_there_are_more_than_escapes() -> None:
    """40 of 4096 lie far out; 15 travel as they are, the others are clipped."""
    codec = of_widths(*[3] * 128, num_features=4096)
    x_TE, stats = random(1, 4096).clamp(-3, 3), torch.zeros(3, dtype=torch.int64)
    x_TE[0, 100:140] = -(FAR + torch.arange(40))
    decoded_TE = codec.decode(codec.encode(x_TE, source=0, stats=stats), source=0)
    assert stats.tolist() == [25, 0, 1]
    assert torch.equal(decoded_TE[0, 125:140], x_TE[0, 125:140].bfloat16().float())
    assert (decoded_TE[0, 100:125] > x_TE[0, 100:125]).all()


def test_escapes_take_the_place_of_the_narrowest_blocks() -> None:
    """254, the scale's code, the feature, its value, then what blocks fit: docs/formats.md."""
    codec = of_widths(2, 1, 1, num_features=96)
    assert (codec.row_nbytes(96), codec.num_escapes) == (17, 1)
    x_TE = torch.ones(1, 96)
    x_TE[0, 70] = -FAR
    row = codec.encode(x_TE, source=0)[0].tolist()
    ones = [0b11110101] * 8  # 0.45, code 1, and 1.06, code 3, four to a byte: the path that errs least in both
    assert row == [254, 127, 70, 0, 0xC8, 0xC2, *ones, 0, 0, 0]
    decoded_TE = codec.decode(torch.tensor([row], dtype=torch.uint8), source=0)
    assert decoded_TE[0, 70] == -FAR
    assert decoded_TE[0, [0, 15, 16, 31]].mul(4096).tolist() == [1855, 1855, 4360, 4360]
    assert decoded_TE[0, 32:].count_nonzero() == 1


@pytest.mark.parametrize(
    ("head", "is_nan"),
    [([0, 0], False), ([253, 255], False), ([254, 253], False), ([254, 254], True), ([255, 0], True)],
)
def test_codes_of_scales_that_stand_for_no_number_are_nan(head: list[int], is_nan: bool) -> None:
    codec = of_widths(4, num_features=32)
    payload = torch.tensor([[*head, 255, 255, 0, 0, *[0] * 11]], dtype=torch.uint8)
    assert codec.num_escapes == 1
    assert codec.decode(payload, source=0).isnan().all() == is_nan


def test_a_row_without_room_for_escapes_cannot_be_guarded() -> None:
    for codec in (of_widths(0, num_features=32), of_widths(2, num_features=32)):
        stats = torch.zeros(3, dtype=torch.int64)
        x_TE = torch.full((1, 32), 1e-3)
        x_TE[0, 3] = 1e3
        payload = codec.encode(x_TE, source=0, stats=stats)
        assert codec.num_escapes == stats[GUARDED] == 0
        payload[0, 0] = token_scale.GUARDED
        assert codec.decode(payload, source=0).isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([*range(9), 16]), min_size=1, max_size=6),
    missing=st.integers(0, 31),
    magnitude=st.integers(-30, 30),
    num_far=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_errors_stay_within_the_bound(widths: list[int], missing: int, magnitude: int, num_far: int, seed: int) -> None:
    num_features = 32 * len(widths) - missing
    codec = of_widths(*sorted(widths, reverse=True), num_features=num_features)
    x_TE = random(3, num_features, seed=seed)
    x_TE[:, random(num_features, seed=seed).argsort()[:num_far]] *= FAR
    x_TE *= 2.0**magnitude
    error_TE = (codec.decode(codec.encode(x_TE, source=0), source=0) - x_TE).abs()
    assert (error_TE <= codec.error_bound(x_TE, source=0)).all()


def test_the_bound_of_a_value_near_the_outermost_level_minds_how_products_round() -> None:
    """What lies beyond that level is a small difference of large numbers."""
    codec = AllocatedCodec(
        scale=(1 + torch.rand(1, 4096, generator=torch.Generator().manual_seed(0))).bfloat16(),
        order=torch.arange(4096, dtype=torch.int32)[None],
        widths=torch.full((1, 128), 4, dtype=torch.uint8),
    )
    x_TE = random(50, 4096, seed=4) * 1.5 * codec.scale.float()
    error_TE = (codec.decode(codec.encode(x_TE, source=0), source=0) - x_TE).abs()
    assert (error_TE <= codec.error_bound(x_TE, source=0)).all()


# --- Who gets which bits ---------------------------------------------------------------------------------------------


def expected_loss(entries: list[Entry], widths: list[Tensor]) -> float:
    """Energy that coding leaves, in the allocation's own model."""
    distortion = torch.tensor([*trellis.DISTORTION, *[0.0] * 8], dtype=torch.float64)
    pairs = zip(entries, widths, strict=True)
    return sum(float((in_blocks(entry.energy)[1] * distortion[each.long()]).sum()) for entry, each in pairs)


energies = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4)


@settings(max_examples=20, deadline=None)
@given(first=energies, second=energies, num_units=st.integers(0, 5))
def test_no_other_allocation_of_as_many_bytes_loses_less(
    first: list[float], second: list[float], num_units: int
) -> None:
    """Two entries of two sources of two blocks: all ways to hand out so few bits."""
    entries = [Entry(torch.tensor(each).double().view(2, 2).repeat_interleave(32, dim=1)) for each in (first, second)]
    widths = allocate(entries, 4 * num_units)
    assert sum(int(each.int().sum(dim=1)[0]) for each in widths) == num_units
    best = math.inf
    for bits in itertools.product(range(num_units + 1), repeat=4):  # of the first block of each source and entry
        for share in range(num_units + 1):
            rows = [(share, bits[0]), (share, bits[1]), (num_units - share, bits[2]), (num_units - share, bits[3])]
            if all(own <= total for total, own in rows):
                blocks = torch.tensor([[own, total - own] for total, own in rows])
                best = min(best, expected_loss(entries, [blocks[:2], blocks[2:]]))
    assert expected_loss(entries, widths) <= best * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    num_sources=st.integers(1, 4),
    num_features=st.integers(1, 300),
    bits=st.floats(0, 17),
    spread=st.integers(0, 20),
    seed=st.integers(0, 999),
)
def test_budgets_are_kept_and_widths_fall(
    num_sources: int, num_features: int, bits: float, spread: int, seed: int
) -> None:
    """What is not counted gets bits too, and takes none from what is."""
    energy_RE = torch.exp2(random(num_sources, num_features, seed=seed) * spread)
    budget_nbytes = bits * num_features / 8
    widths, uncounted = allocate([Entry(energy_RE), Entry(energy_RE, counted=False)], budget_nbytes)
    assert torch.equal(widths, allocate([Entry(energy_RE)], budget_nbytes)[0])
    for each in (widths, uncounted):
        assert each.dtype == torch.uint8 and each.shape == (num_sources, -(-num_features // 32))
        assert ((each <= 8) | (each == 16)).all() and (each.int().diff(dim=1) <= 0).all()
    assert (4 * widths.int().sum(dim=1) <= budget_nbytes).all()
    assert (uncounted >= widths).all()


def test_rows_of_all_sources_are_of_one_size() -> None:
    energy_RE = torch.exp2(random(3, 640) * 2) * torch.tensor([[1.0], [4.0], [100.0]])
    (widths,) = allocate([Entry(energy_RE)], 640 * 2 / 8)
    assert widths.int().sum(dim=1).tolist() == [40, 40, 40]


@pytest.mark.parametrize("bits", [0.0, -1.0, 16.5])
def test_impossible_budgets_are_refused(bits: float) -> None:
    with pytest.raises(InvalidInputError, match="bits: expected above 0, 16 at most"):
        AllocatedRecipe(bits=bits)


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.5])
def test_bits_a_value_are_those_of_the_recipe(bits: float) -> None:
    codec = AllocatedRecipe(bits=bits).codec(Ranges.of(random(2, 50, 4096)))
    assert 0 <= bits * 4096 / 8 + 1 - codec.row_nbytes(4096) < 4
