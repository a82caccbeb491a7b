"""Integers in groups: the peers' arithmetic, written here once more from their sources, and what they break on.

QuickReduce: `CodecQ4::send` and `recv`, csrc/quickreduce/quick_reduce_impl.cuh of vLLM. Flash Communication:
arXiv 2412.04964; its second version, with spikes: arXiv 2508.03760.
"""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from formats import FORMATS
from narrowcast.codecs import Codec, GroupCodec, packing, recipe
from narrowcast.errors import InvalidInputError

Array = NDArray[np.float32]
BF16 = ml_dtypes.bfloat16
F32 = np.float32

GROUPS = {name: codec for name in FORMATS if isinstance(codec := recipe(name), GroupCodec)}
every_group = pytest.mark.parametrize("codec", GROUPS.values(), ids=GROUPS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp(2 * torch.randn(*shape[:-1], 1, generator=generator)) + 0.3


def coded(codec: Codec, x_TE: Tensor) -> Tensor:
    return codec.decode(codec.encode(x_TE, source=0), source=0, num_features=x_TE.shape[1])


def up(x: float) -> np.floating:
    """The BF16 next to `x`, away from zero: by search, where the codec does it with the bits."""
    near = BF16(x)
    return near if abs(F32(near)) >= abs(x) else np.nextafter(near, BF16(math.copysign(np.inf, x)))


def down(x: float) -> np.floating:
    near = BF16(x)
    return near if F32(near) <= x else np.nextafter(near, BF16(-np.inf))


def quick_reduce(group: Array, num_bits: int) -> tuple[list[np.floating], NDArray[np.int64], Array]:
    """Parameters, codes and values of one group, with an fp32 quotient and no epsilon."""
    half = 2 ** (num_bits - 1)
    largest, smallest = group.max(), group.min()
    block_max = largest if abs(largest) > abs(smallest) else smallest
    scale = up(block_max * F32(-1 / half))
    scaled = group * (F32(1) / F32(scale))
    codes = np.rint(scaled.clip(-half, half - 1)).astype(np.int64) + half
    return [scale], codes, (codes - half).astype(F32) * F32(scale)


def flash(group: Array, num_bits: int) -> tuple[list[np.floating], NDArray[np.int64], Array]:
    zero = down(group.min())
    scale = up((group.max() - F32(zero)) / F32(2**num_bits - 1))
    if not scale:
        scale = BF16(2.0**-126)
    codes = np.rint((group - F32(zero)) * (F32(1) / F32(scale))).astype(np.int64)
    return [scale, zero], codes, codes.astype(F32) * F32(scale) + F32(zero)


def flash_with_spikes(group: Array, num_bits: int) -> tuple[list[np.floating], NDArray[np.int64], Array]:
    places = [int(np.argmin(group)), int(np.argmax(group))]
    rest = np.delete(group, places)
    parameters, _, _ = flash(rest if len(rest) else np.zeros(1, F32), num_bits)
    scale, zero = (F32(each) for each in parameters)
    left = group.copy()
    left[places] = zero
    codes = np.rint((left - zero) * (F32(1) / scale)).astype(np.int64)
    values = codes.astype(F32) * scale + zero
    values[places] = group[places].astype(BF16)
    return [*parameters, *group[places].astype(BF16)], codes, values


Peer = Callable[[Array, int], tuple[list[np.floating], NDArray[np.int64], Array]]


def check_against(peer: Peer, codec: GroupCodec, x_E: Tensor) -> None:
    parts = x_E.float().numpy()
    found = [
        peer(parts[start : start + codec.group_size], codec.num_bits)
        for start in range(0, len(parts), codec.group_size)
    ]
    payload_TB = codec.encode(x_E[None], source=0)
    num_parameters = len(found[0][0])
    stored = payload_TB[0, : 2 * num_parameters * len(found)].view(torch.int16).view(num_parameters, -1)
    expected = np.array([parameters for parameters, _, _ in found], dtype=BF16).T.copy()
    assert stored.tolist() == expected.view(np.int16).tolist()
    packed = payload_TB[:, -packing.packed_nbytes(len(parts), codec.num_bits) :]
    codes = packing.unpack(packed, codec.num_bits, len(parts))
    assert codes[0].tolist() == np.concatenate([codes for _, codes, _ in found]).tolist()
    values = torch.from_numpy(np.concatenate([values for _, _, values in found]))
    assert torch.equal(codec.decode(payload_TB, source=0, num_features=len(parts))[0], values)


@every_group
@settings(max_examples=15, deadline=None)
@given(num_features=st.integers(1, 300), seed=st.integers(0, 10**6), bf16=st.booleans())
def test_bytes_and_values_are_those_of_the_peers_arithmetic(
    codec: GroupCodec, num_features: int, seed: int, bf16: bool
) -> None:
    x_E = random(1, num_features, seed=seed)[0]
    peer = quick_reduce if codec.symmetric else flash_with_spikes if codec.spikes else flash
    check_against(peer, codec, x_E.bfloat16() if bf16 else x_E)


def quick_reduce_in_bf16(group: Array) -> tuple[np.floating, NDArray[np.int64]]:
    """The INT4 kernel as it runs on BF16: every operation rounded to BF16, and 1e-7 added to the scale."""
    largest, smallest = BF16(group.max()), BF16(group.min())
    block_max = largest if abs(largest) > abs(smallest) else smallest
    scale = BF16(F32(block_max) * F32(-1 / 8))
    with np.errstate(divide="ignore", invalid="ignore"):
        encoding = BF16(F32(1) / F32(BF16(F32(scale) + F32(np.uint16(0x33D7).view(BF16)))))
        scaled = (group * F32(encoding)).astype(BF16).astype(F32).clip(-8, 7)
    return scale, np.rint(np.nan_to_num(scaled)).astype(np.int64) + 8


def test_quick_reduces_own_rounding_differs_by_a_code_at_most_and_is_no_closer() -> None:
    x_TE = random(400, 32, seed=7).bfloat16()
    codec = GroupCodec(num_bits=4, group_size=32, symmetric=True)
    payload_TB = codec.encode(x_TE, source=0)
    codes = packing.unpack(payload_TB[:, 2:], 4, 32).numpy()
    theirs = [quick_reduce_in_bf16(group) for group in x_TE.float().numpy()]
    scales = np.array([scale for scale, _ in theirs])
    assert payload_TB[:, :2].contiguous().view(torch.int16)[:, 0].tolist() == scales.view(np.int16).tolist()
    difference = codes - np.stack([codes for _, codes in theirs])
    assert abs(difference).max() == 1  # theirs, on the wrong side of a tie
    assert (difference != 0).mean() < 0.05
    values = (np.stack([codes for _, codes in theirs]) - 8) * scales.astype(F32)[:, None]
    assert (coded(codec, x_TE) - x_TE).square().sum() < np.square(values - x_TE.float().numpy()).sum()


def test_a_quiet_group_is_coded_as_well_as_a_loud_one() -> None:
    """QuickReduce adds 1e-7 to a scale of either sign: a group around 1e-6 is bent, one at 8e-7 divides by zero."""
    codec = GroupCodec(num_bits=4, group_size=32, symmetric=True)
    x_TE = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    relative = [((coded(codec, y) - y).norm() / y.norm()).item() for y in (x_TE * 2.0**k for k in (-60, -22, 0, 17))]
    assert len(set(relative)) == 1
    group = (x_TE[0].float() * 2.0**-22).numpy()
    scale, codes = quick_reduce_in_bf16(group)
    assert np.linalg.norm((codes - 8) * F32(scale) - group) / np.linalg.norm(group) > 3 * relative[0]


@every_group
@pytest.mark.parametrize("num_features", [1, 2, 3, 33, 34, 130])
def test_equal_values_and_short_groups(codec: GroupCodec, num_features: int) -> None:
    for value in (0.0, -0.0, 1.0, -3.0, 1.003):
        x_TE = torch.full((2, num_features), value)
        error = (coded(codec, x_TE) - x_TE).abs()
        assert (error <= codec.error_bound(x_TE, source=0)).all()
        assert error.max() <= abs(value) * (2**-7 if not codec.symmetric else 2.0**-codec.num_bits)


def test_the_sign_of_zero_does_not_depend_on_the_order_of_a_reduction() -> None:
    codec = GroupCodec(num_bits=4, group_size=32)
    payloads = [codec.encode(torch.tensor([x]), source=0) for x in ([-0.0, 0.0, 1.0], [0.0, -0.0, 1.0])]
    assert torch.equal(*payloads)
    assert payloads[0][0, 2:4].tolist() == [0, 0]


def test_of_equal_extremes_the_first_is_kept() -> None:
    codec = GroupCodec(num_bits=2, group_size=32, spikes=True)
    payload_TB = codec.encode(torch.tensor([[0.0, 4.0, -4.0, 4.0, -4.0, 1.0]]), source=0)
    assert payload_TB[0, 8:10].tolist() == [2, 1]  # places of -4.0 and 4.0
    codes = packing.unpack(payload_TB[:, 10:], 2, 6)
    assert codes.tolist() == [[1, 0, 0, 3, 0, 2]]  # in steps of 8 / 3 from -4.0; 0 in the places of the spikes


def test_spikes_shrink_the_error_at_two_bits() -> None:
    x_TE = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    x_TE[:, 5], x_TE[:, 77] = 40.0, -30.0
    error = {
        spikes: (coded(GroupCodec(num_bits=2, group_size=128, spikes=spikes), x_TE) - x_TE).square().mean()
        for spikes in (False, True)
    }
    assert error[True] < error[False] / 20


@every_group
@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
)
@example(values=[torch.finfo(torch.float32).max, 0.0, -1.0])
@example(values=[-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max])
def test_any_finite_values_keep_to_the_bound_or_are_nan(codec: GroupCodec, values: list[float]) -> None:
    """Beyond half of the FP32 range a group may not be expressible: then it is NaN, not another number."""
    x_TE = torch.tensor([values])
    decoded = coded(codec, x_TE)
    nan = decoded.isnan()
    assert not decoded.isinf().any()
    assert ((decoded - x_TE).abs() <= codec.error_bound(x_TE, source=0))[~nan].all()
    if max(map(abs, values)) < 2.0**125:
        assert not nan.any()


def test_the_code_that_has_no_opposite_clips_and_is_counted() -> None:
    codec = GroupCodec(num_bits=4, group_size=32, symmetric=True)
    stats = torch.zeros(3, dtype=torch.int64)
    payload_TB = codec.encode(torch.tensor([[8.0, -8.0, 7.4, -7.6, 1.0]]), source=0, stats=stats)
    assert stats.tolist() == [1, 0, 0]  # -7.6 would take code 8, as 8.0 takes -8
    assert codec.decode(payload_TB, source=0, num_features=5).tolist() == [[7.0, -8.0, 7.0, -8.0, 1.0]]


@pytest.mark.parametrize(
    "fields",
    [{"num_bits": 1}, {"num_bits": 9}, {"group_size": 0}, {"group_size": 48}, {"symmetric": True, "spikes": True}],
)
def test_impossible_parameters_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="2 to 8 bits, groups of 32, 64 or 128"):
        GroupCodec(**({"num_bits": 4, "group_size": 32} | fields))


def test_places_that_no_encoder_writes_do_no_harm() -> None:
    codec = GroupCodec(num_bits=2, group_size=32, spikes=True)
    payload = torch.full((1, codec.row_nbytes(40)), 0x3F, dtype=torch.uint8)
    payload[:, 16:20] = 0xFF
    assert codec.decode(payload, source=0, num_features=40).shape == (1, 40)
