"""The scale of a token in a byte, found by its mean square: eight steps an octave."""

from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs.tables import PerDevice

LANES = 32  # sums that a mean square is taken in

# The token's scale: code c in 1 to 253 stands for 2 ** ((c - 127) / 8), rounded to FP32.
ZERO, SMALLEST, LARGEST, GUARDED, NOT_FINITE = 0, 1, 253, 254, 255
STEPS_PER_OCTAVE, CODE_OF_ONE = 8, 127


class TokenScales(NamedTuple):
    """Look-ups of kernels, fp32.

    `scales` and their `reciprocals` by code [256], zero for codes that stand for no number. `edges`: mean squares at
    which the next code begins [252], squares of the geometric middle between two scales.
    """

    scales: Tensor
    reciprocals: Tensor
    edges: Tensor


def _token_scales() -> TokenScales:
    scales = torch.zeros(256)
    codes = torch.arange(SMALLEST, LARGEST + 1, dtype=torch.float64)
    scales[SMALLEST : LARGEST + 1] = torch.exp2((codes - CODE_OF_ONE) / STEPS_PER_OCTAVE).float()
    middles = codes[:-1] + 0.5 - CODE_OF_ONE
    return TokenScales(
        scales=scales,
        reciprocals=torch.where(scales > 0, 1.0 / scales, 0.0),
        edges=torch.exp2(2 * middles / STEPS_PER_OCTAVE).float(),
    )


TOKEN_SCALES = PerDevice(_token_scales())


def scale_code(mean_square: Tensor) -> Tensor:
    """The code of the token scale nearest to the root of `mean_square` (fp32, not negative), int64."""
    edges = TOKEN_SCALES.on(mean_square.device).edges
    code = SMALLEST + torch.bucketize(mean_square.contiguous(), edges, right=True)
    return code.masked_fill(mean_square == 0, ZERO)


def mean_square(u_TN: Tensor) -> Tensor:
    """Mean of squares [T] over N values, a multiple of 32 but for the last ones, in one stated order.

    32 sums, of the values 0, 32, 64, ..., of 1, 33, 65, ..., and so on; then the upper half of the sums is added to the
    lower half until one is left; then a product with FP32 1 / N. One where there are no values, as calibrated.
    """
    num_values = u_TN.shape[1]
    if not num_values:
        return u_TN.new_ones(len(u_TN))
    square_TN = torch.nn.functional.pad(u_TN * u_TN, (0, -num_values % LANES))
    sums = square_TN[:, :LANES].clone()
    for start in range(LANES, square_TN.shape[1], LANES):
        sums += square_TN[:, start : start + LANES]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0] * (1.0 / torch.tensor(float(num_values)))  # a number of FP32 on the host
