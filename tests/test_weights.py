"""Matrices in few bits: packing loses nothing, and a product has the same bits from every kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.codecs import kernels
from narrowcast.errors import InvalidInputError
from narrowcast.weights.formats import Q4_0, Q4_1, Q8_0, TERNARY, GroupedCodes, WeightFormat, w4a16
from narrowcast.weights.packed import PackedMatrix
from narrowcast.weights.products import (
    DENSE_TOKENS,
    ZERO_POINT_TOKENS,
    dequantized_bf16,
    look_up,
    multiply,
    multiply_dense,
)

FORMATS = [Q4_0, Q4_1, Q8_0, TERNARY, w4a16(32), w4a16(64), w4a16(128)]
ERRORS = {"int8": 0.012, "bf16": 0.004}  # relative, of Gaussian activations; of a result in BF16 0.002 are its own
PATHS = [path for path in kernels.available() if path != kernels.REFERENCE]

formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def random_codes(form: WeightFormat, num_rows: int, num_columns: int, scale_dtype: torch.dtype | None = None):
    codes = torch.randint(0, 3 if form.is_ternary else 1 << form.num_bits, (num_rows, num_columns), dtype=torch.uint8)
    shape, dtype = form.scales_shape(num_rows, num_columns), scale_dtype or form.scale_dtypes[0]
    scales = (torch.randn(shape) * 0.01).to(dtype)
    if form.offset == "minimum":
        return GroupedCodes(form, codes, scales, (torch.randn(shape) * 0.05).to(dtype))
    points = torch.randint(0, 16, shape, dtype=torch.uint8)
    return GroupedCodes(form, codes, scales, points if form.offset == "zero_point" else None)


def random_tokens(num_tokens: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Of all magnitudes, with features that stand out."""
    x_TK = torch.randn(num_tokens, num_columns) * torch.randn(num_tokens, 1).mul(4).exp()
    x_TK[:, 3::50] *= 30
    return x_TK.to(dtype)


def products(matrix: PackedMatrix, x_TK: Tensor, **options) -> dict[str, Tensor]:
    """By path."""
    found = {}
    for path in [kernels.REFERENCE, *PATHS]:
        with kernels.forced(path):
            found[path] = multiply(matrix, x_TK, **options)
    return found


@formats
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_kernel_gives_the_bits_of_the_reference(form, data):
    num_rows, num_groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    num_tokens = data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    codes = random_codes(form, num_rows, num_groups * form.group_size, data.draw(st.sampled_from(form.scale_dtypes)))
    bias = torch.randn(num_rows).to(dtype) if data.draw(st.booleans()) else None

    found = products(PackedMatrix.pack(codes), random_tokens(num_tokens, codes.codes.shape[1], dtype), bias=bias)

    for path in PATHS:
        assert torch.equal(found[path], found[kernels.REFERENCE]), path


@formats
def test_packing_loses_nothing(form):
    codes = random_codes(form, 37, 3 * form.group_size)
    unpacked = PackedMatrix.pack(codes).unpacked()

    assert torch.equal(unpacked.codes, codes.codes)
    assert torch.equal(unpacked.scales, codes.scales)
    assert (unpacked.offsets is None) == (codes.offsets is None)
    assert codes.offsets is None or torch.equal(unpacked.offsets, codes.offsets)


@formats
def test_a_matrix_takes_the_bits_of_its_format(form):
    bits = {"int4-group32": 4.5, "int4-group32-minimum": 5, "int8-group32": 8.5, "ternary": 2}
    expected = bits.get(form.name, 4 + 32 / form.group_size)

    assert PackedMatrix.empty(form, (256, 1024)).nbytes * 8 == expected * 256 * 1024


@formats
def test_the_error_is_that_of_the_activations(form):
    codes, x_TK = random_codes(form, 64, 1024), torch.randn(8, 1024)
    exact = x_TK.double() @ codes.dequantized().double().T

    found = multiply(PackedMatrix.pack(codes), x_TK)

    assert (found - exact).norm() < ERRORS[form.activations] * exact.norm()


@formats
@pytest.mark.parametrize("path", [kernels.REFERENCE, *PATHS])
def test_part_of_a_matrix_multiplies_like_a_matrix_of_that_part(form, path):
    codes, size = random_codes(form, 50, 5 * form.group_size), form.group_size
    matrix, x_TK = PackedMatrix.pack(codes), random_tokens(3, 3 * form.group_size, torch.bfloat16)
    rows, columns = slice(7, 41), slice(size, 4 * size)
    alone = PackedMatrix.pack(matrix.unpacked(rows, columns))

    with kernels.forced(path):
        assert torch.equal(multiply(matrix, x_TK, rows=rows, columns=columns), multiply(alone, x_TK))


@formats
def test_a_token_s_bits_do_not_depend_on_others(form):
    matrix = PackedMatrix.pack(random_codes(form, 20, 4 * form.group_size))
    x_TK = random_tokens(20, 4 * form.group_size, torch.bfloat16)
    together = multiply(matrix, x_TK)

    for token in range(len(x_TK)):
        assert torch.equal(multiply(matrix, x_TK[token : token + 1])[0], together[token])


@formats
def test_a_long_prompt_is_multiplied_like_its_parts(form):
    """In C++ so many tokens are prepared at a time that scratch stays small."""
    matrix = PackedMatrix.pack(random_codes(form, 20, form.group_size))
    x_TK = random_tokens(2100, form.group_size, torch.bfloat16)
    whole = multiply(matrix, x_TK, num_tokens=1)

    assert torch.equal(whole, torch.cat([multiply(matrix, part, num_tokens=1) for part in x_TK.split(50)]))


@formats
@pytest.mark.parametrize("path", [kernels.REFERENCE, *PATHS])
def test_what_is_not_finite_is_never_a_plausible_number(form, path):
    codes = random_codes(form, 20, 4 * form.group_size)
    x_TK = torch.randn(4, codes.codes.shape[1])
    x_TK[1, 5], x_TK[2, 70], x_TK[3, 1] = torch.nan, torch.inf, -torch.inf

    with kernels.forced(path):
        y_TN = multiply(PackedMatrix.pack(codes), x_TK)

    assert y_TN[0].isfinite().all()
    assert not y_TN[1:].isfinite().any()


@formats
def test_tokens_of_zeros_and_of_next_to_nothing_give_zeros(form):
    x_TK = torch.zeros(2, 2 * form.group_size)
    x_TK[1] = 1e-37

    assert not multiply(PackedMatrix.pack(random_codes(form, 20, 2 * form.group_size)), x_TK).any()


@formats
@pytest.mark.parametrize("path", [kernels.REFERENCE, *PATHS])
def test_rows_are_looked_up(form, path):
    codes = random_codes(form, 40, 3 * form.group_size, form.scale_dtypes[-1])
    rows = torch.tensor([39, 0, 17, 17])
    with kernels.forced(path):
        assert torch.equal(look_up(PackedMatrix.pack(codes), rows), codes.dequantized()[rows])


@formats
def test_rows_come_in_parts(form):
    codes = random_codes(form, 40, 2 * form.group_size)
    matrix = PackedMatrix.pack(codes)
    in_parts = PackedMatrix.empty(form, (40, 2 * form.group_size), scale=matrix.scale)
    for start in (32, 0):
        in_parts.fill(start, matrix.unpacked(slice(start, start + 32)))

    assert torch.equal(in_parts.unpacked().codes, codes.codes)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_prompts_multiply_dequantized_weights(group_size):
    form = w4a16(group_size)
    codes = random_codes(form, 40, 512, torch.bfloat16)
    matrix, x_TK = PackedMatrix.pack(codes), torch.randn(ZERO_POINT_TOKENS, 512).bfloat16()

    assert torch.equal(dequantized_bf16(matrix), codes.dequantized().bfloat16())
    assert torch.equal(multiply(matrix, x_TK), torch.nn.functional.linear(x_TK, codes.dequantized().bfloat16()))


def test_columns_are_whole_groups():
    with pytest.raises(InvalidInputError, match="whole groups of 32"):
        PackedMatrix.empty(Q4_0, (16, 40))


@given(st.integers(1, 30), st.integers(1, 300), st.integers(1, DENSE_TOKENS - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_products_with_bf16_have_the_bits_of_the_reference(num_rows, num_columns, num_tokens, has_bias):
    weight_NK, x_TK = torch.randn(num_rows, num_columns + 3).bfloat16()[:, 3:], torch.randn(num_tokens, num_columns)
    bias = torch.randn(num_rows).bfloat16() if has_bias else None
    found = {}
    for path in [kernels.REFERENCE, *PATHS]:
        with kernels.forced(path):
            found[path] = multiply_dense(weight_NK, x_TK.bfloat16(), bias)

    exact = torch.nn.functional.linear(x_TK.bfloat16().double(), weight_NK.double())
    exact = exact if bias is None else exact + bias.double()
    # Sums of K products in FP32, at most (K + 8) halves of its unit off, and a result rounded to 8 bits.
    magnitudes = x_TK.bfloat16().double().abs() @ weight_NK.double().abs().T
    bound = exact.abs() * 2.0**-8 + magnitudes * (num_columns + 8) * 2.0**-24
    assert ((found[kernels.REFERENCE].double() - exact).abs() <= bound).all()
    for path in PATHS:
        assert torch.equal(found[path], found[kernels.REFERENCE]), path


@pytest.mark.parametrize("path", [kernels.REFERENCE, *PATHS])
def test_subnormal_values_count_as_zeros(path):
    weight_NK, x_TK = torch.full((3, 40), 2.0**-127).bfloat16(), torch.full((2, 40), 2.0**120).bfloat16()
    with kernels.forced(path):
        assert not multiply_dense(weight_NK, x_TK).any()
        assert not multiply_dense(x_TK[:1].expand(3, 40).contiguous(), weight_NK[:2]).any()
        assert multiply_dense(2 * weight_NK, x_TK).all()


def test_many_tokens_are_left_to_pytorch():
    weight_NK, x_TK = torch.randn(8, 64).bfloat16(), torch.randn(DENSE_TOKENS, 64).bfloat16()

    assert torch.equal(multiply_dense(weight_NK, x_TK), torch.nn.functional.linear(x_TK, weight_NK))
