"""Products of tokens with matrices in few bits: which kernel, and when PyTorch's is the faster one.

Shapes: T tokens, N rows, K columns of a matrix.
"""

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.codecs import kernels
from narrowcast.codecs.kernels import cpu
from narrowcast.weights import reference
from narrowcast.weights.packed import ALL, BLOCK_ROWS, PackedMatrix

# Tokens from which on a matrix multiplies faster by PyTorch: of BF16 values, and of codes that become such first
# (benchmarks/results/weights.json). Kernels for activations in 8 bits are the faster ones for any number.
DENSE_TOKENS, ZERO_POINT_TOKENS = 5, 129


def multiply(
    matrix: PackedMatrix,
    x_TK: Tensor,
    bias: Tensor | None = None,
    *,
    rows: slice = ALL,
    columns: slice = ALL,
    num_tokens: int | None = None,
) -> Tensor:
    """Products [T, N] of tokens with rows of a matrix, plus the bias [N]; of the tokens' dtype, BF16 or FP32.

    `columns`: those, whole groups, that the tokens' values belong to. `num_tokens`: of which these are some; by default
    they are all. By it PyTorch's product is chosen, or ours, where a token's bits depend neither on other tokens nor on
    other rows.
    """
    first, stop, _ = rows.indices(matrix.shape[0])
    left, right, _ = columns.indices(matrix.shape[1])
    if cpu.native is None or kernels.reference_is_forced():
        return reference.multiply(matrix.unpacked(slice(first, stop), slice(left, right)), x_TK, bias)
    num_tokens = len(x_TK) if num_tokens is None else num_tokens
    if matrix.format.activations == "bf16" and num_tokens >= ZERO_POINT_TOKENS:
        weight = dequantized_bf16(matrix, slice(first, stop), slice(left, right))
        return functional.linear(x_TK.bfloat16(), weight, None if bias is None else bias.bfloat16()).to(x_TK.dtype)
    if before := first % BLOCK_ROWS:  # blocks of rows are whole: those before the first one are computed as well
        padded = None if bias is None else functional.pad(bias, (before, 0))
        whole = slice(first - before, stop)
        return multiply(matrix, x_TK, padded, rows=whole, columns=columns, num_tokens=num_tokens)[:, before:]
    x_TK = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
    y_TN = x_TK.new_empty(len(x_TK), stop - first)
    cpu.native.multiply_packed(
        matrix.native,
        first,
        stop - first,
        left,
        right - left,
        x_TK.data_ptr(),
        cpu.DTYPES[x_TK.dtype],
        len(x_TK),
        x_TK.stride(0),
        0 if bias is None else bias.data_ptr(),
        y_TN.data_ptr(),
        y_TN.stride(0),
        _num_threads(),
    )
    return y_TN


def dequantized_bf16(matrix: PackedMatrix, rows: slice = ALL, columns: slice = ALL) -> Tensor:
    """Values [N, K] of rows and columns, rounded to BF16 once."""
    first, stop, _ = rows.indices(matrix.shape[0])
    left, right, _ = columns.indices(matrix.shape[1])
    is_fast = matrix.format.offset == "zero_point" and first % BLOCK_ROWS == 0
    if cpu.native is None or kernels.reference_is_forced() or not is_fast:
        return matrix.unpacked(slice(first, stop), slice(left, right)).dequantized().bfloat16()
    out = torch.empty(stop - first, right - left, dtype=torch.bfloat16)
    place = first, stop - first, left, right - left
    cpu.native.dequantize_packed(matrix.native, *place, out.data_ptr(), _num_threads())
    return out


def look_up(matrix: PackedMatrix, rows_T: Tensor) -> Tensor:
    """Rows [T, K] of a matrix by their numbers, of any integer dtype, FP32."""
    if cpu.native is not None and not kernels.reference_is_forced():
        rows_T, out_TK = rows_T.long().contiguous(), torch.empty(len(rows_T), matrix.shape[1])
        cpu.native.look_up_packed(matrix.native, rows_T.data_ptr(), *out_TK.shape, out_TK.data_ptr())
        return out_TK
    distinct, places = rows_T.div(BLOCK_ROWS, rounding_mode="floor").unique(return_inverse=True)
    blocks = matrix.of_blocks(distinct)
    return blocks.unpacked().rows(places * BLOCK_ROWS + rows_T % BLOCK_ROWS).dequantized()


def multiply_dense(
    weight_NK: Tensor, x_TK: Tensor, bias: Tensor | None = None, *, num_tokens: int | None = None
) -> Tensor:
    """As `functional.linear` of BF16 on the CPU, reading weights at the memory's rate where there are few tokens.

    Values below 2**-126 count as zeros then. `num_tokens` as of `multiply`.
    """
    in_bf16 = weight_NK.dtype is x_TK.dtype is torch.bfloat16
    is_few = (len(x_TK) if num_tokens is None else num_tokens) < DENSE_TOKENS
    if not (in_bf16 and is_few and weight_NK.is_cpu and weight_NK.stride(-1) == 1) or cpu.native is None:
        return functional.linear(x_TK, weight_NK, bias)
    if kernels.reference_is_forced():
        return reference.multiply_dense(weight_NK, x_TK, bias)
    x_TK = x_TK.contiguous()
    y_TN = x_TK.new_empty(len(x_TK), len(weight_NK))
    cpu.native.multiply_bf16(
        weight_NK.data_ptr(),
        weight_NK.stride(0),
        len(weight_NK),
        weight_NK.shape[1],
        x_TK.data_ptr(),
        len(x_TK),
        0 if bias is None else bias.data_ptr(),
        y_TN.data_ptr(),
        y_TN.stride(0),
        _num_threads(),
    )
    return y_TN


def _num_threads() -> int:
    return min(torch.get_num_threads(), cpu.cores_of_this_rank())
