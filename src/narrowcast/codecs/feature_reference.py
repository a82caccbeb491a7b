"""The reference kernels of `feature`, and its guard.

Static scales clip what lies beyond them. So a guard watches for tokens that lie far beyond, and codes these in as
many bytes as symmetric integers of `group`, which find their scales in the token.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs import arithmetic, packing
from narrowcast.codecs.base import GUARDED, NON_FINITE, SATURATED
from narrowcast.codecs.group import group_decode_sum, group_encode

# A BF16 NaN that no conversion produces (those give 0x7FC0, or 0xFFFF). In the first outlier's place it
# announces a token that is coded differently in the same number of bytes.
GUARD_MARK = 0xFFC1


class Guard(NamedTuple):
    """The code of tokens that lie far out of range: the mark, then all E features as `group` codes them, symmetric.

    One bit is possible here: a value is its group's `far`, or zero.
    """

    num_bits: int
    group_size: int

    def nbytes(self, num_features: int) -> int:
        """Bytes after the mark; the rest of the row is zero."""
        return 2 * -(-num_features // self.group_size) + packing.packed_nbytes(num_features, self.num_bits)

    def encode(self, x_TE: Tensor, row_nbytes: int) -> Tensor:
        """Rows uint8 [T, B] of fp32 `x_TE`, the mark before them and zeros behind."""
        out_TB = torch.zeros(len(x_TE), row_nbytes, dtype=torch.uint8, device=x_TE.device)
        out_TB[:, 0], out_TB[:, 1] = GUARD_MARK & 0xFF, GUARD_MARK >> 8
        group_encode(x_TE, *self, True, False, out_TB[:, 2 : 2 + self.nbytes(x_TE.shape[1])], None)
        return out_TB

    def decode(self, payload_TB: Tensor, num_features: int) -> Tensor:
        """Values fp32 [T, E] of rows with the mark."""
        out_TE = torch.empty(len(payload_TB), num_features, device=payload_TB.device)
        group_decode_sum(payload_TB[None, :, 2 : 2 + self.nbytes(num_features)], *self, True, False, out_TE)
        return out_TE


@cache
def guard_for(num_features: int, num_outliers: int, num_bits: int) -> Guard | None:
    """The most bits below `num_bits`, then the smallest groups, that fit a row; None without outliers or room."""
    row_nbytes = 2 * num_outliers + packing.packed_nbytes(num_features - num_outliers, num_bits)
    for fewer_bits in range(num_bits - 1, 0, -1) if num_outliers else ():
        for group_size in range(32, num_features + 32, 32):
            guard = Guard(fewer_bits, group_size)
            if 2 + guard.nbytes(num_features) <= row_nbytes:
                return guard
    return None


def far_out(x_TE: Tensor, products_TE: Tensor, num_coded: int, num_bits: int) -> Tensor:
    """The tokens, bool [T], that the guard codes: a product beyond 4 times the largest code, or 1/16 beyond 3/2 of it.

    None that holds a value which is not finite. `products_TE`: fp32 `x_TE` times reciprocals, which are zero for
    outliers; `num_coded` features are none.
    """
    largest = 2 ** (num_bits - 1) - 1
    sizes_TE = products_TE.abs()
    farthest_T = sizes_TE.amax(dim=1)
    if not arithmetic.perhaps_any(farthest_T > 1.5 * largest):  # mostly: the rest takes longer
        return torch.zeros_like(farthest_T, dtype=torch.bool)
    are_many_T = (sizes_TE > 1.5 * largest).count_nonzero(dim=1) * 16 > num_coded
    is_far_T: Tensor = (farthest_T > 4 * largest) | are_many_T
    return is_far_T & ~arithmetic.not_finite(x_TE).any(dim=1)


def feature_encode(
    x_TE: Tensor,
    reciprocal_E: Tensor,
    outliers_K: Tensor,
    holes: Tensor,
    fillers: Tensor,
    num_bits: int,
    guard: Guard | None,
    out_TB: Tensor,
    stats: Tensor | None,
) -> None:
    """One pass over all features as if none were an outlier, then as many moves as the outliers left holes.

    `reciprocal_E` is zero for outliers. Tokens that are `far_out` are coded by the guard.
    """
    num_features, num_outliers = x_TE.shape[1], len(outliers_K)
    num_coded = num_features - num_outliers
    largest, offset = 2 ** (num_bits - 1) - 1, 2 ** (num_bits - 1)
    x_TE = x_TE.float()
    not_finite_TE = arithmetic.not_finite(x_TE)
    products_TE = x_TE * reciprocal_E
    guarded_T = torch.zeros(len(x_TE), dtype=torch.bool, device=x_TE.device)
    if guard is not None:
        guarded_T = far_out(x_TE, products_TE, num_coded, num_bits)
    steps_TE = products_TE.round_()
    codes_TE = steps_TE.clamp(-largest, largest)
    if stats is not None:
        clipped_TE = (codes_TE != steps_TE).masked_fill_(not_finite_TE | guarded_T[:, None], False)
        stats[SATURATED] += clipped_TE.count_nonzero()
        stats[NON_FINITE] += not_finite_TE.count_nonzero()
        stats[GUARDED] += guarded_T.count_nonzero()
    codes_TE.add_(offset).masked_fill_(not_finite_TE, 0)  # the free code point
    codes_TE[:, holes] = codes_TE[:, fillers]
    if num_outliers:
        outliers_TK = x_TE[:, outliers_K].bfloat16()
        outliers_TK.masked_fill_(arithmetic.not_finite(outliers_TK), torch.nan)
        out_TB[:, : 2 * num_outliers] = outliers_TK.view(torch.uint8)
    out_TB[:, 2 * num_outliers :] = packing.pack(codes_TE[:, :num_coded].to(torch.uint8), num_bits)
    if guard is not None and arithmetic.perhaps_any(guarded_T):
        out_TB.copy_(torch.where(guarded_T[:, None], guard.encode(x_TE, out_TB.shape[1]), out_TB))


def feature_decode_sum(
    payloads_RTB: Tensor,
    scale_RE: Tensor,
    outliers_K: Tensor,
    holes: Tensor,
    fillers: Tensor,
    num_bits: int,
    guard: Guard | None,
    out_TE: Tensor,
) -> None:
    """Decode each rank's payload with its own scales, or as the guard coded it, and sum in fp32, in rank order."""
    num_features, num_outliers = scale_RE.shape[1], len(outliers_K)
    num_coded, offset = num_features - num_outliers, 2 ** (num_bits - 1)
    decoded = []
    for payload_TB, scale_E in zip(payloads_RTB, scale_RE, strict=True):
        codes_TN = packing.unpack(payload_TB[:, 2 * num_outliers :], num_bits, num_coded)
        steps_TE = torch.zeros(out_TE.shape, device=payload_TB.device)
        steps_TE[:, :num_coded] = codes_TN.float().sub_(offset).masked_fill_(codes_TN == 0, torch.nan)
        steps_TE[:, fillers] = steps_TE[:, holes]
        values_TE = steps_TE.mul_(scale_E.float())
        if num_outliers:
            values_TE[:, outliers_K] = arithmetic.values(payload_TB[:, : 2 * num_outliers], torch.bfloat16)
            marked_T = (payload_TB[:, 0].int() | payload_TB[:, 1].int() << 8) == GUARD_MARK
            if guard is None:
                values_TE.masked_fill_(marked_T[:, None], torch.nan)
            elif arithmetic.perhaps_any(marked_T):
                values_TE = torch.where(marked_T[:, None], guard.decode(payload_TB, num_features), values_TE)
        decoded.append(values_TE)
    arithmetic.store_sum(decoded, out_TE)
