"""FP8, FP6 and FP4 against implementations that are not ours: PyTorch's casts, ml_dtypes, torchao's MX and NVFP4.

torchao 0.18.0 (installed without its dependencies) complains when it is imported beside PyTorch 2.13.0, so it is
no dependency of the tests: those that need it run where it is installed, and passed when this was written.
"""

import logging
import warnings
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import formats
from narrowcast.codecs import Codec, MinifloatCodec, packing, recipe
from narrowcast.codecs.floats import FORMATS, FloatFormat
from narrowcast.errors import InvalidInputError

CPU = torch.device("cpu")
NUMPY = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
every_element = pytest.mark.parametrize("element", FORMATS)

CODECS = {name: codec for name in formats.FORMATS if isinstance(codec := recipe(name), MinifloatCodec)}
every_minifloat = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
MX = {name: codec for name, codec in CODECS.items() if codec.scale == "e8m0"}
every_mx = pytest.mark.parametrize("codec", MX.values(), ids=MX.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp(4 * torch.randn(*shape, generator=generator))


def coded(codec: Codec, x_TE: Tensor) -> Tensor:
    return codec.decode(codec.encode(x_TE, source=0), source=0, num_features=x_TE.shape[1])


def elements(codec: MinifloatCodec, payload_TB: Tensor, num_features: int) -> Tensor:
    num_bits = FORMATS[codec.element].num_bits
    return packing.unpack(payload_TB[:, -packing.packed_nbytes(num_features, num_bits) :], num_bits, num_features)


def rounded(x: Tensor, form: FloatFormat) -> Tensor:
    codes = form.round(x).clamp(max=form.largest_code)
    return (codes + x.signbit() * form.sign).to(torch.uint8)


def numpy_cast(x: Tensor, element: str) -> Tensor:
    largest = FORMATS[element].largest
    cast = x.clamp(-largest, largest).numpy().astype(NUMPY[element])
    return torch.from_numpy(cast.view(np.uint8) & 2 ** FORMATS[element].num_bits - 1)


@every_element
def test_every_code_stands_for_what_others_say(element: str) -> None:
    form = FORMATS[element]
    codes = np.arange(2**form.num_bits, dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(NUMPY[element]).astype(np.float32))
    theirs[theirs.isinf()] = torch.nan
    assert torch.equal(form.values(CPU).nan_to_num(1e9), theirs.nan_to_num(1e9))
    info = ml_dtypes.finfo(NUMPY[element])
    assert form.largest == float(info.max)
    assert form.largest_exponent == np.frexp(form.largest)[1] - 1


@every_element
def test_rounding_is_that_of_ml_dtypes_and_pytorch(element: str) -> None:
    """Random values, and every code's neighbourhood: numbers, middles between them, and one fp32 beside either."""
    form = FORMATS[element]
    numbers = form.values(CPU)[: form.largest_code + 1]
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles])
    beside = [torch.nextafter(exact, torch.tensor(bound)) for bound in (torch.inf, -torch.inf)]
    x = torch.cat([exact, *beside, random(100_000).abs(), random(100_000, seed=1).abs() * 1e-3, torch.zeros(1)])
    x = torch.cat([x, -x])
    assert torch.equal(rounded(x, form), numpy_cast(x, element))
    if element in TORCH:
        cast = x.clamp(-form.largest, form.largest).to(TORCH[element])
        assert torch.equal(rounded(x, form), cast.view(torch.uint8))


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("block_size", [None, 128])
@settings(max_examples=20, deadline=None)
@given(num_features=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_fp8_is_pytorchs_cast_of_the_scaled_values(
    element: str, block_size: int | None, num_features: int, seed: int
) -> None:
    codec = MinifloatCodec(element=element, block_size=block_size)
    x_TE = random(3, num_features, seed=seed)
    payload_TB = codec.encode(x_TE, source=0)
    largest = torch.finfo(TORCH[element]).max
    for start in range(0, num_features, block_size or num_features):
        block = x_TE[:, start : start + (block_size or num_features)]
        column = start // (block_size or num_features)
        scale = payload_TB[:, 2 * column : 2 * column + 2].clone().view(torch.bfloat16).float()
        wanted = block.abs().amax(dim=1, keepdim=True) / largest
        assert (scale >= wanted).all() and (scale <= wanted * (1 + 2**-7)).all()
        cast = (block * (1 / scale)).clamp(-largest, largest).to(TORCH[element])
        found = elements(codec, payload_TB, num_features)[:, start : start + block.shape[1]]
        assert torch.equal(found, cast.view(torch.uint8))
        decoded = codec.decode(payload_TB, source=0, num_features=num_features)
        assert torch.equal(decoded[:, start : start + block.shape[1]], cast.float() * scale)


@every_mx
@settings(max_examples=20, deadline=None)
@given(num_features=st.integers(1, 100), seed=st.integers(0, 10**6), power=st.integers(-100, 80))
def test_mx_blocks_follow_the_specification(codec: MinifloatCodec, num_features: int, seed: int, power: int) -> None:
    """Section 6.3 of the OCP Microscaling specification v1.0, with ml_dtypes for elements and for scales."""
    x_TE = random(2, num_features, seed=seed) * 2.0**power
    payload_TB = codec.encode(x_TE, source=0)
    decoded = codec.decode(payload_TB, source=0, num_features=num_features)
    emax = np.frexp(float(ml_dtypes.finfo(NUMPY[codec.element]).max))[1] - 1
    for start in range(0, num_features, 32):
        block = x_TE[:, start : start + 32]
        shared = np.frexp(block.abs().amax(dim=1).numpy())[1] - 1 - emax
        scale = np.ldexp(np.float32(1), shared)
        assert (
            payload_TB[:, start // 32].numpy().tolist()
            == scale.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist()
        )
        codes = numpy_cast(block / torch.from_numpy(scale)[:, None], codec.element)
        assert torch.equal(elements(codec, payload_TB, num_features)[:, start : start + 32], codes)
        values = FORMATS[codec.element].values(CPU)[codes.int()] * torch.from_numpy(scale)[:, None]
        assert torch.equal(decoded[:, start : start + 32], values)


@every_mx
def test_every_block_scale_is_that_of_ml_dtypes(codec: MinifloatCodec) -> None:
    """0xFF is NaN for the whole block, whatever its elements."""
    one = int((FORMATS[codec.element].values(CPU) == 1).nonzero()[0, 0])
    codes = packing.pack(torch.full((256, 3), one, dtype=torch.uint8), FORMATS[codec.element].num_bits)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    decoded = codec.decode(torch.cat([scales, codes], dim=1), source=0, num_features=3)
    theirs = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(decoded.nan_to_num(7), torch.from_numpy(theirs).expand(256, 3).nan_to_num(7))
    assert decoded[255].isnan().all() and decoded[:255].isfinite().all()


@pytest.mark.parametrize(
    "preset",
    [
        "minifloat(element=e2m3, scale=e8m0, size=32)",
        "minifloat(element=e3m2, scale=e8m0, size=32)",
        "mxfp4",
        "nvfp4",
        "minifloat(element=e2m1, size=32)",
    ],
)
def test_a_block_that_is_not_finite_is_marked_in_its_scale(preset: str) -> None:
    codec = CODECS[preset]
    x_TE = torch.ones(1, 70)
    x_TE[0, 40] = torch.inf
    payload_TB = codec.encode(x_TE, source=0)
    assert codec.block_size is not None
    block = 40 // codec.block_size
    first = {
        "bf16": slice(2 * block, 2 * block + 2),
        "e8m0": slice(block, block + 1),
        "e4m3": slice(2 + block, 3 + block),
    }
    mark = {"bf16": [0xC0, 0x7F], "e8m0": [0xFF], "e4m3": [0x7F]}
    assert payload_TB[0, first[codec.scale]].tolist() == mark[codec.scale]


@every_minifloat
@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
)
def test_any_finite_values_stay_finite_and_keep_to_the_bound(codec: MinifloatCodec, values: list[float]) -> None:
    x_TE = torch.tensor([values])
    decoded = coded(codec, x_TE)
    if x_TE.abs().max() < 2.0**127:
        assert decoded.isfinite().all()
        assert ((decoded - x_TE).abs() <= codec.error_bound(x_TE, source=0)).all()


@every_minifloat
def test_zero_keeps_its_sign(codec: MinifloatCodec) -> None:
    codes = elements(codec, codec.encode(torch.tensor([[0.0, -0.0, -1e-30, 1.0]]), source=0), 4)
    sign = FORMATS[codec.element].sign
    assert codes[0, :3].tolist() == [0, sign, sign]


def test_saturation_is_counted() -> None:
    """The block's scale is a power of two: 7.9 is divided by 1 and FP4 ends at 6, but 6.9 rounds to 6 by itself."""
    stats = torch.zeros(3, dtype=torch.int64)
    assert (
        CODECS["mxfp4"].encode(torch.tensor([[7.9, -7.9, 6.9, 5.0, torch.nan]])[:, :4], source=0, stats=stats).numel()
    )
    assert stats.tolist() == [2, 0, 0]


def test_nvfp4_reaches_from_the_smallest_to_the_largest() -> None:
    """E4M3 scales alone end at 448 * 6 and fade below 2**-9; the token's scale carries them anywhere."""
    x_TE = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    relative = [
        ((coded(CODECS["nvfp4"], y) - y).norm() / y.norm()).item() for y in (x_TE * 2.0**k for k in (-60, 0, 18))
    ]
    assert len(set(relative)) == 1
    assert relative[0] < 0.11


@pytest.mark.parametrize(
    "fields",
    [
        {"element": "e3m4"},
        {"scale": "fp32"},
        {"block_size": 31},
        {"scale": "e8m0"},
        {"scale": "e4m3", "block_size": 32},
    ],
)
def test_impossible_parameters_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match="an element of e4m3, e5m2"):
        MinifloatCodec(**({"element": "e2m1"} | fields))  # type: ignore[arg-type]


@pytest.fixture
def mx_formats() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return pytest.importorskip("torchao.prototype.mx_formats")
        finally:
            logging.disable(logging.NOTSET)


@every_mx
def test_mx_is_torchaos(codec: MinifloatCodec, mx_formats: ModuleType) -> None:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    names = TORCH | {"e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e2m1": torch.float4_e2m1fn_x2}
    x_TE = torch.cat([random(500, 96, seed=seed) * 2.0**power for seed, power in enumerate((-90, -20, 0, 20, 80))])
    x_TE = torch.cat([x_TE, x_TE.bfloat16().float(), torch.zeros(1, 96)])
    scales, data = to_mx(x_TE, names[codec.element], 32)
    payload_TB = codec.encode(x_TE, source=0)
    assert torch.equal(payload_TB[:, :3], scales.view(torch.uint8))
    codes = data.view(torch.uint8)
    if codec.element == "e2m1":  # neighbours share a byte there
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    assert torch.equal(elements(codec, payload_TB, 96), codes)


def test_nvfp4_is_torchaos_with_a_scale_for_each_token(mx_formats: ModuleType) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    codec = CODECS["nvfp4"]
    for seed in range(200):
        x_TE = random(1, 96, seed=seed)
        payload_TB = codec.encode(x_TE, source=0)
        token = payload_TB[:, :2].clone().view(torch.bfloat16).float()
        scales, data = nvfp4_quantize(x_TE, 16, token)
        assert torch.equal(payload_TB[:, 2:8], scales.view(torch.uint8))
        codes = data.view(torch.uint8)
        assert torch.equal(elements(codec, payload_TB, 96), torch.stack([codes & 15, codes >> 4], dim=2).flatten(1))
