"""Plain values to codes in groups of 32, as llama.cpp and its Python package `gguf` round them.

Shapes: N rows, K columns, G groups of 32 columns. FP32, each operation rounded by itself.
"""

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError
from narrowcast.weights.formats import Q4_0, Q8_0, GroupedCodes

GROUP_SIZE = 32


def quantize_int4(x_NK: Tensor) -> GroupedCodes:
    """As GGUF's Q4_0: the value that is farthest from zero becomes code 0, -8 times the scale.

    A group with a value that is not finite decodes to NaN. InvalidInputError if K is no multiple of 32.
    """
    x_NGk = _grouped(x_NK)
    farthest_NG1 = x_NGk.gather(-1, x_NGk.abs().argmax(-1, keepdim=True))
    scales_NG1 = farthest_NG1 / -8
    scaled_NGk = (x_NGk * _reciprocal(scales_NG1)).add_(8.5).nan_to_num_(8).clamp_(0, 15)
    return GroupedCodes(Q4_0, scaled_NGk.to(torch.uint8).flatten(1), scales_NG1[..., 0].half())


def quantize_int8(x_NK: Tensor) -> GroupedCodes:
    """As GGUF's Q8_0: the value that is farthest from zero is 127 times the scale; halves go away from zero.

    A group with a value that is not finite decodes to NaN. InvalidInputError if K is no multiple of 32.
    """
    x_NGk = _grouped(x_NK)
    scales_NG1 = x_NGk.abs().amax(-1, keepdim=True) / 127
    scaled_NGk = (x_NGk * _reciprocal(scales_NG1)).nan_to_num_(0).clamp_(-128, 127)
    codes_NGk = scaled_NGk.to(torch.int8)  # towards zero, as the halves of what is left
    codes_NGk += scaled_NGk.sub_(codes_NGk).mul_(2).to(torch.int8)
    return GroupedCodes(Q8_0, codes_NGk.view(torch.uint8).flatten(1) ^ Q8_0.middle, scales_NG1[..., 0].half())


def _grouped(x_NK: Tensor) -> Tensor:
    if x_NK.ndim != 2 or x_NK.shape[1] % GROUP_SIZE:
        raise InvalidInputError(
            "weights to quantize",
            expected=f"a matrix with a multiple of {GROUP_SIZE} columns",
            found=f"shape {tuple(x_NK.shape)}",
            remedy="Leave these in 16 bits.",
        )
    return x_NK.float().reshape(len(x_NK), x_NK.shape[1] // GROUP_SIZE, GROUP_SIZE)


def _reciprocal(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1 / scales)
