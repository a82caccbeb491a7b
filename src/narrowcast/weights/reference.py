"""Products with matrices in few bits in plain PyTorch: what they are, bit for bit; the kernels do the same faster.

FP32, every multiplication and addition rounded by itself, sums over groups in their order.
"""

import torch
from torch import Tensor

from narrowcast.weights.formats import GroupedCodes

GROUP = 32  # columns that share a scale of activations in 8 bits
SMALLEST_SCALE = 2.0**-100  # of activations: groups of nothing larger are zeros
SMALLEST = 2.0**-118  # of activations in BF16: below it they are zeros (csrc/weights/halves.h)
CHAINS = 64  # sums of BF16 products that go on together


def multiply(codes: GroupedCodes, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products [T, N] of tokens with a matrix [N, K], plus the bias [N], of the tokens' dtype."""
    y_TN = _multiply_halves(codes, x_TK) if codes.format.activations == "bf16" else _multiply_integers(codes, x_TK)
    return (y_TN if bias is None else y_TN + bias.float()).to(x_TK.dtype)


def encode_activations(x_TK: Tensor, *, by_token: bool) -> tuple[Tensor, Tensor]:
    """Codes [T, G, 32], whole numbers from -127 to 127 in FP32, and scales FP32 [T, G].

    A group, or with `by_token` a token, that holds a value which is not finite has NaN for its scale.
    """
    x_TGk = x_TK.float().unflatten(1, (-1, GROUP))
    largest = x_TGk.abs().amax(dim=2)
    if by_token:
        largest = largest.amax(dim=1, keepdim=True).expand_as(largest)
    is_zero, is_finite = largest < SMALLEST_SCALE, largest.isfinite()
    scale = torch.where(is_zero, 0.0, torch.where(is_finite, largest / 127.0, torch.nan))
    quotient = torch.full_like(largest, 127.0) / largest  # 127.0 / largest would be 127 times a rounded reciprocal
    reciprocal = torch.where(is_zero | ~is_finite, 0.0, quotient)
    scaled = x_TGk * reciprocal[..., None]
    return torch.where(scaled.isfinite(), scaled, 0.0).round(), scale


def _multiply_integers(codes: GroupedCodes, x_TK: Tensor) -> Tensor:
    form = codes.format
    q_TGk, scale_TG = encode_activations(x_TK, by_token=form.is_ternary)
    zero = 0 if form.offset == "minimum" else form.middle
    w_NGk = (codes.codes.float() - zero).unflatten(1, (-1, GROUP))
    if form.is_ternary:
        count_TN: Tensor = q_TGk.flatten(1).double() @ w_NGk.flatten(1).double().T  # whole numbers: exact
        return count_TN.float() * (codes.scales[0, 0] * scale_TG[:, :1])
    y_TN = x_TK.new_zeros(len(x_TK), len(w_NGk), dtype=torch.float32)
    for group in range(w_NGk.shape[1]):
        sum_TN = q_TGk[:, group] @ w_NGk[:, group].T  # below 2**24: exact
        scale_T1 = scale_TG[:, group, None]
        y_TN = y_TN + sum_TN * (codes.scales[:, group].float() * scale_T1)
        if codes.offsets is not None:
            y_TN = y_TN + codes.offsets[:, group].float() * (scale_T1 * q_TGk[:, group].sum(1, keepdim=True))
    return y_TN


def _multiply_halves(codes: GroupedCodes, x_TK: Tensor) -> Tensor:
    assert codes.offsets is not None
    middle = codes.format.middle
    x_TGk = _halves(x_TK).unflatten(1, (-1, codes.format.group_size))
    w_NGk = (codes.codes.float() - middle).unflatten(1, (-1, codes.format.group_size))
    y_TN = x_TK.new_zeros(len(x_TK), len(w_NGk), dtype=torch.float32)
    for group in range(w_NGk.shape[1]):
        x_Tlik, w_Nlik = (each[:, group].unflatten(1, (-1, 4, 2)) for each in (x_TGk, w_NGk))  # lines of four pairs
        dots_TNi = _add_pairs(x_Tlik, w_Nlik)
        dot_TN = (dots_TNi[..., 0] + dots_TNi[..., 1]) + (dots_TNi[..., 2] + dots_TNi[..., 3])
        zero_N = codes.offsets[:, group].float() - middle
        sums_T1 = _sum_by_halves(_chain(x_TGk[:, group].unflatten(1, (-1, 16))))
        y_TN = y_TN + codes.scales[:, group].float() * (dot_TN - zero_N * sums_T1)
    return y_TN


def multiply_dense(weight_NK: Tensor, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products [T, N] of BF16 tokens with BF16 weights: 64 sums of pairs of columns, added up by halves."""
    missing = -x_TK.shape[1] % (2 * CHAINS)
    x_Tlik, w_Nlik = (
        torch.nn.functional.pad(_normal(each), (0, missing)).unflatten(1, (-1, CHAINS, 2)) for each in (x_TK, weight_NK)
    )
    y_TN = _sum_by_halves(_add_pairs(x_Tlik, w_Nlik).flatten(0, 1)).view(len(x_TK), len(weight_NK))
    return (y_TN if bias is None else y_TN + bias.float()).to(x_TK.dtype)


def _normal(x: Tensor) -> Tensor:
    """FP32 values, those below 2**-126 being zeros, as the instruction for such products has them."""
    return torch.where(x.float().abs() < 2.0**-126, 0.0, x.float())


def _halves(x_TK: Tensor) -> Tensor:
    x_TK = x_TK.bfloat16().float()
    return torch.where(x_TK.abs() < SMALLEST, 0.0, x_TK)


def _add_pairs(x_Tlik: Tensor, w_Nlik: Tensor) -> Tensor:
    """Sums [T, N, i] over the lines l, in order: of each pair the odd column, then the even one."""
    sums_TNi = x_Tlik.new_zeros(len(x_Tlik), len(w_Nlik), x_Tlik.shape[2])
    for line in range(x_Tlik.shape[1]):
        for k in (1, 0):
            sums_TNi = sums_TNi + x_Tlik[:, None, line, :, k] * w_Nlik[None, :, line, :, k]
    return sums_TNi


def _chain(x_Tli: Tensor) -> Tensor:
    """Sums [T, i] over l, in order."""
    sums_Ti = x_Tli.new_zeros(len(x_Tli), x_Tli.shape[2])
    for line in range(x_Tli.shape[1]):
        sums_Ti = sums_Ti + x_Tli[:, line]
    return sums_Ti


def _sum_by_halves(x_Ti: Tensor) -> Tensor:
    """Sums [T, 1]: the second half is added to the first until one is left."""
    while x_Ti.shape[1] > 1:
        half = x_Ti.shape[1] // 2
        x_Ti = x_Ti[:, :half] + x_Ti[:, half:]
    return x_Ti
