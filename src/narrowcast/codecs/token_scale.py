"""The scale of a token in a byte, found by its mean square: eight steps an octave."""

import torch
from torch import Tensor

LANES = 32  # sums that a mean square is taken in

# The token's scale: code c in 1 to 253 stands for 2 ** ((c - 127) / 8), rounded to FP32.
ZERO, SMALLEST, LARGEST, GUARDED, NOT_FINITE = 0, 1, 253, 254, 255
STEPS_PER_OCTAVE, CODE_OF_ONE = 8, 127


def _token_scales() -> Tensor:
    """FP32 [256]: what each code stands for; zero for those that stand for no number."""
    scales = torch.zeros(256)
    codes = torch.arange(SMALLEST, LARGEST + 1, dtype=torch.float64)
    scales[SMALLEST : LARGEST + 1] = torch.exp2((codes - CODE_OF_ONE) / STEPS_PER_OCTAVE).float()
    return scales


TOKEN_SCALES = _token_scales()
# Mean squares at which the next code begins: squares of the geometric middle between two scales. FP32 [252].
_middles = torch.arange(SMALLEST, LARGEST, dtype=torch.float64) + 0.5 - CODE_OF_ONE
SCALE_EDGES = torch.exp2(2 * _middles / STEPS_PER_OCTAVE).float()


def scale_code(mean_square: Tensor) -> Tensor:
    """The code of the token scale nearest to the root of `mean_square` (fp32, not negative), int64."""
    code = SMALLEST + torch.bucketize(mean_square.contiguous(), SCALE_EDGES.to(mean_square.device), right=True)
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
    return sums[:, 0] * (1.0 / torch.tensor(float(num_values)))


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """What kernels look up: scales and their reciprocals by code, and the edges, NaN behind them; all FP32 [256]."""
    reciprocal = torch.where(TOKEN_SCALES > 0, 1.0 / TOKEN_SCALES, 0.0)
    return TOKEN_SCALES, reciprocal, torch.nn.functional.pad(SCALE_EDGES, (0, 256 - len(SCALE_EDGES)), value=torch.nan)
