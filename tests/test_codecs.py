"""The contract of every codec, checked over all formats and widths.

Cheapest layer: one process, no ranks.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats import FORMATS
from models import calibrated
from narrowcast.codecs import CODECS, CastCodec, Codec, FeatureCodec, Ranges, recipe
from narrowcast.codecs.feature_reference import GUARD_MARK
from narrowcast.errors import InvalidInputError

every_format = pytest.mark.parametrize("preset", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
sizes = st.integers(1, 200)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def coded(codec: Codec, x_TE: Tensor, source: int = 0) -> Tensor:
    return codec.decode(codec.encode(x_TE, source=source), source=source, num_features=x_TE.shape[1])


def is_guarded(codec: Codec, payload_TB: Tensor) -> Tensor:
    """Which tokens [T] bear the mark of `feature`'s guard."""
    if not isinstance(codec, FeatureCodec) or not len(codec.outliers):
        return torch.zeros(len(payload_TB), dtype=torch.bool)
    return (payload_TB[:, 0] == GUARD_MARK & 0xFF) & (payload_TB[:, 1] == GUARD_MARK >> 8)


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).flatten().tolist()


@every_format
@every_dtype
@settings(max_examples=15, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    num_tokens=st.integers(0, 9),
    num_features=sizes,
    scale=st.sampled_from([1.5, 10.0]),  # some values clip, or all lie far out of range
    seed=st.integers(0, 99),
)
def test_error_stays_within_the_bound(
    preset: str, dtype: torch.dtype, num_ranks: int, num_tokens: int, num_features: int, scale: float, seed: int
) -> None:
    codec, _ = calibrated(preset, random(num_ranks, 20, num_features, seed=seed))
    x_TE = random(num_tokens, num_features, seed=seed + 1, scale=scale).to(dtype)
    source = num_ranks - 1
    payload_TB = codec.encode(x_TE, source=source)
    assert payload_TB.dtype == torch.uint8
    assert payload_TB.shape == (num_tokens, codec.row_nbytes(num_features))
    assert payload_TB.numel() == codec.payload_nbytes(num_tokens, num_features)
    error = (codec.decode(payload_TB, source=source, num_features=num_features) - x_TE.float()).abs()
    assert (error <= codec.error_bound(x_TE, source=source)).all()


@every_format
@settings(max_examples=15, deadline=None)
@given(num_features=sizes, cut=st.integers(0, 8), seed=st.integers(0, 99))
def test_a_tokens_bytes_depend_on_that_token_alone(preset: str, num_features: int, cut: int, seed: int) -> None:
    codec, _ = calibrated(preset, random(2, 20, num_features, seed=seed))
    x_TE = random(8, num_features, seed=seed + 1)
    chunks = [codec.encode(chunk, source=1) for chunk in (x_TE[:cut], x_TE[cut:])]
    assert torch.equal(codec.encode(x_TE, source=1), torch.cat(chunks))
    strided = torch.empty(8, 2 * num_features)[:, ::2].copy_(x_TE)
    assert torch.equal(codec.encode(strided, source=1), torch.cat(chunks))


@every_format
@settings(max_examples=15, deadline=None)
@given(num_features=sizes, start=st.integers(0, 200), stop=st.integers(0, 200), seed=st.integers(0, 99))
def test_a_block_of_features_decodes_as_it_does_among_all(
    preset: str, num_features: int, start: int, stop: int, seed: int
) -> None:
    """Unless a guard codes the token, or just the block, in another form (tests/test_drift.py)."""
    codec, _ = calibrated(preset, random(2, 20, num_features, seed=seed))
    unit = codec.granularity or num_features
    start, stop = sorted((start % num_features // unit * unit, min(stop // unit * unit, num_features)))
    stop = num_features if seed % 2 else stop
    x_TE = random(3, num_features, seed=seed + 1)
    block = codec.features(start, stop)
    alike_T = ~is_guarded(codec, codec.encode(x_TE, source=1))
    alike_T &= ~is_guarded(block, block.encode(x_TE[:, start:stop], source=1))
    assert torch.equal(coded(block, x_TE[:, start:stop], 1)[alike_T], coded(codec, x_TE, 1)[alike_T, start:stop])


@every_format
def test_the_sum_is_taken_in_fp32_in_rank_order(preset: str) -> None:
    x_RTE = random(5, 7, 70, scale=1e3)
    codec, _ = calibrated(preset, x_RTE)
    payloads_RTB = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(x_RTE)])
    expected = codec.decode(payloads_RTB[0], source=0, num_features=70)
    for rank in range(1, 5):
        expected = expected + codec.decode(payloads_RTB[rank], source=rank, num_features=70)
    assert torch.equal(codec.decode_sum(payloads_RTB, num_features=70), expected)
    assert torch.equal(codec.decode_sum(payloads_RTB, dtype=torch.bfloat16, num_features=70), expected.bfloat16())
    out = torch.empty(7, 140)[:, ::2]
    assert codec.decode_sum(payloads_RTB, out=out) is out
    assert torch.equal(out, expected)


@every_format
def test_a_zero_token_decodes_to_zeros(preset: str) -> None:
    codec, _ = calibrated(preset, random(2, 20, 70))
    assert torch.equal(coded(codec, torch.zeros(3, 70)), torch.zeros(3, 70))


@every_format
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1e-3, 1.0, 1e3, 3e5])
def test_finite_stays_finite(preset: str, magnitude: float) -> None:
    """Peers' fp16 scales lose values below 2e-3 and overflow above 65504."""
    if preset == "cast(dtype=fp16)" and magnitude > 65504:
        pytest.skip("fp16 holds no more, and says so")
    x_TE = random(50, 70).clamp(-1, 1) * magnitude
    codec, _ = calibrated(preset, x_TE[None])
    decoded = coded(codec, x_TE)
    assert decoded.isfinite().all()
    assert (decoded - x_TE).abs().max() <= max(codec.error_bound(x_TE, source=0).max().item(), 1e-38)
    assert (decoded - x_TE).abs().max() <= magnitude  # at two bits, a step is as large as the range


@every_format
@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_out_as_the_canonical_nan(preset: str, dtype: torch.dtype, bad: float) -> None:
    """As far as the codec says and no farther, by bit pattern, also where PyTorch's own conversion gives 0xFFFF."""
    x_TE = random(70, 70)
    codec, _ = calibrated(preset, x_TE[None])
    for token in range(70):
        x_TE[token, token] = bad
    decoded = codec.decode_sum(codec.encode(x_TE, source=0)[None], dtype=dtype, num_features=70)
    unit_E = torch.arange(70) // (codec.nan_reach or 70)
    assert torch.equal(decoded.isnan(), unit_E[:, None] == unit_E)
    canonical = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}[dtype]
    nan = decoded[decoded.isnan()]
    assert set(nan.view(torch.int32 if dtype == torch.float32 else torch.int16).tolist()) == {canonical}


@every_format
def test_nan_of_any_bit_pattern_is_nan(preset: str) -> None:
    """Directed rounding works on bits, where some patterns of NaN would run over into numbers."""
    codec, _ = calibrated(preset, random(1, 20, 70))
    patterns = [0x7FFFFFFF, -1, 0x7F800001, 0x7FFF0000, -0x7FFFFF, -0x80000000 + 0x7FFF8000]
    for pattern in patterns:
        x_TE = random(2, 70)
        x_TE[0, 40] = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)
        decoded = coded(codec, x_TE)
        assert decoded[0, 40].isnan() and decoded[1].isfinite().all()


@pytest.mark.parametrize(
    "preset",
    [
        "bf16",
        "cast(dtype=fp32)",
        "int4-feature",
        "fp8",
        "minifloat(element=e5m2, size=128)",
        "minifloat(element=e4m3, scale=e8m0, size=32)",
    ],
)
def test_a_format_with_a_code_for_nan_uses_it(preset: str) -> None:
    assert calibrated(preset, torch.ones(1, 1, 70))[0].nan_reach == 1


@every_format
def test_counters_tell_clipped_from_not_finite(preset: str) -> None:
    codec, _ = calibrated(preset, random(1, 50, 70).clamp(-1, 1))
    x_TE, stats = torch.zeros(4, 70), torch.zeros(3, dtype=torch.int64)
    x_TE[0, :] = 1.4
    x_TE[1, :3] = torch.nan
    x_TE[2, :] = 1e4
    codec.encode(x_TE, source=0, stats=stats)
    clipped, guarded = 0, 0  # most codecs reach as far as the values do
    if isinstance(codec, FeatureCodec):
        guarded = int(len(codec.outliers) > 0)
        near = codec.num_bits > 2  # of two bits: 1.4 steps are rounded to the only one
        clipped = (70 - len(codec.outliers)) * (near + 1 - guarded)
    assert stats.tolist() == [clipped, 3, guarded]


@every_format
@settings(max_examples=15, deadline=None)
@given(num_features=sizes, more=st.integers(1, 40))
def test_a_number_of_features_is_found_or_asked_for_but_never_guessed(
    preset: str, num_features: int, more: int
) -> None:
    codec, _ = calibrated(preset, random(1, 20, num_features))
    x_TE = random(2, num_features)
    payload_TB = codec.encode(x_TE, source=0)
    expected = codec.decode(payload_TB, source=0, num_features=num_features)
    try:
        assert torch.equal(codec.decode(payload_TB, source=0), expected)
    except InvalidInputError as error:
        assert "Pass num_features, or out." in str(error)
        widths = [each for each in range(1, 300) if codec.row_nbytes(each) == payload_TB.shape[1]]
        assert num_features in widths and len(widths) > 1
    assert torch.equal(codec.decode(payload_TB, source=0, out=torch.empty(2, num_features)), expected)
    too_long = torch.cat([payload_TB, torch.zeros(2, 8 * more, dtype=torch.uint8)], dim=1)
    with pytest.raises(InvalidInputError):
        codec.decode(too_long, source=0, num_features=num_features)
    with pytest.raises(InvalidInputError):
        codec.decode(payload_TB, source=0, out=torch.empty(2, num_features + 8 * more))
    with pytest.raises(InvalidInputError):
        codec.decode(payload_TB, source=0, out=torch.empty(3, num_features))


@every_format
def test_state_makes_the_codec_again(preset: str) -> None:
    codec, _ = calibrated(preset, random(2, 20, 70))
    config, tensors = codec.state()
    again = CODECS[codec.id].from_state(json.loads(json.dumps(config)), tensors)
    x_TE = random(5, 70, seed=1)
    assert torch.equal(again.encode(x_TE, source=1), codec.encode(x_TE, source=1))


@every_format
def test_wrong_input_is_refused_with_a_sentence(preset: str) -> None:
    codec, _ = calibrated(preset, random(2, 20, 70))
    with pytest.raises(InvalidInputError, match=r"expected values \[tokens, features\]"):
        codec.encode(torch.zeros(4, 70, dtype=torch.int64), source=0)
    with pytest.raises(InvalidInputError, match=r"found \[4\]"):
        codec.encode(torch.zeros(4), source=0)
    if codec.num_sources is not None:
        with pytest.raises(InvalidInputError, match="source rank from 0 to 1, found 2"):
            codec.encode(torch.zeros(4, 70), source=2)
        with pytest.raises(InvalidInputError, match="70 features, as calibrated, found 71"):
            codec.encode(torch.zeros(4, 71), source=0)
        with pytest.raises(InvalidInputError, match="payloads of 2 ranks, found 3"):
            codec.decode_sum(torch.zeros(3, 1, codec.row_nbytes(70), dtype=torch.uint8))


def test_casts_agree_with_pytorch_on_finite_values() -> None:
    x_TE = random(9, 33, scale=100)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        payload = CastCodec(dtype=dtype).encode(x_TE, source=0)
        assert bits(payload) == bits(x_TE.to(dtype))


def test_ranges_of_tokens() -> None:
    ranges = Ranges.of(torch.tensor([[[1.0, -3.0], [2.0, 1.0]]]))
    assert ranges.low.tolist() == [[1.0, -3.0]]
    assert ranges.high.tolist() == [[2.0, 1.0]]
    assert ranges.width.tolist() == [[4.0, 6.0]]


def test_codecs_without_tensors_are_values_and_their_own_recipes() -> None:
    dynamic = [made for made in map(recipe, FORMATS) if isinstance(made, Codec)]
    assert len({repr(codec) for codec in dynamic}) == len(set(dynamic)) == len(dynamic) > 40
    for codec in dynamic:
        assert codec.codec(Ranges.of(torch.ones(1, 1, 3))) is codec
        assert CODECS[codec.id].from_state(*codec.state()) == codec
