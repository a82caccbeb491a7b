"""Products of tokens with weights to time: of any format, ordinary numbers that mean nothing."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from narrowcast.codecs.kernels import cpu
from narrowcast.engines import Matrix
from narrowcast.weights.formats import WeightFormat
from narrowcast.weights.packed import PackedMatrix
from narrowcast.weights.products import multiply, multiply_dense

BEYOND_CACHES = 256 << 20  # bytes
VALUE, BYTE = 0.01, 0x3C  # of which made, packed values and scales are ordinary numbers, too

Format = WeightFormat | torch.dtype


def product(form: Format, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The product of tokens [T, K] with a matrix [N, K] of its own, which is in memory."""
    if isinstance(form, torch.dtype):
        return partial(multiply_dense, torch.full(shape, VALUE, dtype=form))
    matrix = PackedMatrix.empty(form, shape)
    matrix.blocks.fill_(BYTE)
    return partial(multiply, matrix)


def tokens(form: Format, num_tokens: int, num_columns: int) -> Tensor:
    """Values [T, K] of the dtype that goes with weights in a format."""
    return torch.full((num_tokens, num_columns), VALUE, dtype=form if isinstance(form, torch.dtype) else torch.bfloat16)


def copies(nbytes: int) -> int:
    """So many of `nbytes` in all are too many for a cache; one where products are computed slowly, value by value."""
    return 1 if cpu.native is None else -(-BEYOND_CACHES // nbytes)


def nbytes_of(form: Format, shape: tuple[int, int]) -> int:
    """Bytes of a matrix in memory."""
    return Matrix(shape=shape, format=form, is_shared=False).nbytes
