"""`feature`: a few outlier features in BF16, all others as small integers with static scales.

The method of arXiv 2411.07942 (Dong et al.): calibrate once, then no scale travels. With E = 256 features,
4 bits and E // 64 outliers a value takes (252 * 4 + 4 * 16) / 256 = 4.1875 bits.

Static scales clip what lies beyond them. So a guard watches for tokens that lie far beyond, and codes these in as
many bytes as symmetric integers of `group`, which find their scales in the token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from narrowcast.codecs import ops
from narrowcast.codecs.base import Codec, Ranges, is_positive
from narrowcast.codecs.group import group_decode_sum, group_encode, group_error_bound
from narrowcast.codecs.kernels import cpu
from narrowcast.errors import InvalidInputError

RANDOM_SEED = 241107942  # nobody's default, so that no other random choice repeats ours


class Guard(NamedTuple):
    """How tokens far out of range are coded: the mark, then all E features as `group` codes them, symmetric.

    One bit is possible here: a value is its group's `far`, or zero.
    """

    num_bits: int
    group_size: int

    def nbytes(self, num_features: int) -> int:
        """Bytes after the mark; the rest of the row is zero."""
        return 2 * -(-num_features // self.group_size) + ops.packed_nbytes(num_features, self.num_bits)

    def encode(self, x_TE: Tensor, row_nbytes: int) -> Tensor:
        """Rows uint8 [T, B] of fp32 `x_TE`, the mark before them and zeros behind."""
        out_TB = torch.zeros(len(x_TE), row_nbytes, dtype=torch.uint8, device=x_TE.device)
        out_TB[:, 0], out_TB[:, 1] = ops.GUARD_MARK & 0xFF, ops.GUARD_MARK >> 8
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
    row_nbytes = 2 * num_outliers + ops.packed_nbytes(num_features - num_outliers, num_bits)
    for fewer_bits in range(num_bits - 1, 0, -1) if num_outliers else ():
        for group_size in range(32, num_features + 32, 32):
            guard = Guard(fewer_bits, group_size)
            if 2 + guard.nbytes(num_features) <= row_nbytes:
                return guard
    return None


def far_out(x_TE: Tensor, products_TE: Tensor, num_coded: int, num_bits: int) -> Tensor:
    """Which tokens, bool [T], the guard codes: a product beyond 4 times the largest code, or 1/16 beyond 3/2 of it.

    None that holds a value which is not finite. `products_TE`: fp32 `x_TE` times reciprocals, which are zero for
    outliers; `num_coded` features are none.
    """
    largest = 2 ** (num_bits - 1) - 1
    sizes_TE = products_TE.abs()
    farthest_T = sizes_TE.amax(dim=1)
    if not _perhaps_any(farthest_T > 1.5 * largest):  # mostly: the rest takes longer
        return torch.zeros_like(farthest_T, dtype=torch.bool)
    are_many_T = (sizes_TE > 1.5 * largest).count_nonzero(dim=1) * 16 > num_coded
    is_far_T: Tensor = (farthest_T > 4 * largest) | are_many_T
    return is_far_T & ~ops.not_finite(x_TE).any(dim=1)


def _perhaps_any(mask_T: Tensor) -> bool:
    """False where there are certainly none: elsewhere than on the CPU, asking would wait for the device."""
    return not mask_T.is_cpu or bool(mask_T.any())


@ops.operator(
    "feature_encode(Tensor x, Tensor reciprocal, Tensor outliers, Tensor holes, Tensor fillers, int num_bits,"
    " Tensor(a!) out, Tensor(b!)? stats) -> ()"
)
def feature_encode(
    x_TE: Tensor,
    reciprocal_E: Tensor,
    outliers_K: Tensor,
    holes: Tensor,
    fillers: Tensor,
    num_bits: int,
    out_TB: Tensor,
    stats: Tensor | None,
) -> None:
    """One pass over all features as if none were an outlier, then as many moves as the outliers left holes.

    `reciprocal_E` is zero for outliers. Tokens that are `far_out` are coded by their `guard_for`.
    """
    num_features, num_outliers = x_TE.shape[1], len(outliers_K)
    num_coded = num_features - num_outliers
    largest, offset = 2 ** (num_bits - 1) - 1, 2 ** (num_bits - 1)
    x_TE = x_TE.float()
    not_finite_TE = ops.not_finite(x_TE)
    products_TE = x_TE * reciprocal_E
    guard = guard_for(num_features, num_outliers, num_bits)
    guarded_T = torch.zeros(len(x_TE), dtype=torch.bool, device=x_TE.device)
    if guard is not None:
        guarded_T = far_out(x_TE, products_TE, num_coded, num_bits)
    steps_TE = products_TE.round_()
    codes_TE = steps_TE.clamp(-largest, largest)
    if stats is not None:
        clipped_TE = (codes_TE != steps_TE).masked_fill_(not_finite_TE | guarded_T[:, None], False)
        stats[ops.SATURATED] += clipped_TE.count_nonzero()
        stats[ops.NON_FINITE] += not_finite_TE.count_nonzero()
        stats[ops.GUARDED] += guarded_T.count_nonzero()
    codes_TE.add_(offset).masked_fill_(not_finite_TE, 0)  # the free code point
    codes_TE[:, holes] = codes_TE[:, fillers]
    if num_outliers:
        outliers_TK = x_TE[:, outliers_K].bfloat16()
        outliers_TK.masked_fill_(ops.not_finite(outliers_TK), torch.nan)
        out_TB[:, : 2 * num_outliers] = outliers_TK.view(torch.uint8)
    out_TB[:, 2 * num_outliers :] = ops.pack(codes_TE[:, :num_coded].to(torch.uint8), num_bits)
    if guard is not None and _perhaps_any(guarded_T):
        out_TB.copy_(torch.where(guarded_T[:, None], guard.encode(x_TE, out_TB.shape[1]), out_TB))


@ops.operator(
    "feature_decode_sum(Tensor payloads, Tensor scale, Tensor outliers, Tensor holes, Tensor fillers, int num_bits,"
    " Tensor(a!) out) -> ()"
)
def feature_decode_sum(
    payloads_RTB: Tensor,
    scale_RE: Tensor,
    outliers_K: Tensor,
    holes: Tensor,
    fillers: Tensor,
    num_bits: int,
    out_TE: Tensor,
) -> None:
    """Decode each rank's payload with its own scales, or as the guard coded it, and sum in fp32, in rank order."""
    num_features, num_outliers = scale_RE.shape[1], len(outliers_K)
    num_coded, offset = num_features - num_outliers, 2 ** (num_bits - 1)
    guard = guard_for(num_features, num_outliers, num_bits)
    decoded = []
    for payload_TB, scale_E in zip(payloads_RTB, scale_RE, strict=True):
        codes_TN = ops.unpack(payload_TB[:, 2 * num_outliers :], num_bits, num_coded)
        steps_TE = torch.zeros(out_TE.shape, device=payload_TB.device)
        steps_TE[:, :num_coded] = codes_TN.float().sub_(offset).masked_fill_(codes_TN == 0, torch.nan)
        steps_TE[:, fillers] = steps_TE[:, holes]
        values_TE = steps_TE.mul_(scale_E.float())
        if num_outliers:
            values_TE[:, outliers_K] = ops.values(payload_TB[:, : 2 * num_outliers], torch.bfloat16)
            marked_T = (payload_TB[:, 0].int() | payload_TB[:, 1].int() << 8) == ops.GUARD_MARK
            if guard is None:
                values_TE.masked_fill_(marked_T[:, None], torch.nan)
            elif _perhaps_any(marked_T):
                values_TE = torch.where(marked_T[:, None], guard.decode(payload_TB, num_features), values_TE)
        decoded.append(values_TE)
    ops.store_sum(decoded, out_TE)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureCodec(Codec):
    """Symmetric integers of `num_bits` (2 to 8) with one scale per (source, feature), outliers in BF16.

    `scale`: bf16 [R, E], positive. `outliers`: int64 [K], ascending, the same for every source.
    A token far beyond its scales is coded by the guard instead: as integers of fewer bits with scales of its own.
    With K = 0 a payload has no place for the guard's mark, so that such a codec always clips.

    >>> codec = FeatureCodec(
    ...     num_bits=4, scale=torch.full((1, 4), 0.5, dtype=torch.bfloat16), outliers=torch.tensor([1])
    ... )
    >>> codec.row_nbytes(4)  # one BF16 value, then three codes
    4
    >>> payload = codec.encode(torch.tensor([[0.5, 100.0, -1.1, 9.0]]), source=0)
    >>> codec.decode(payload, source=0)  # 9.0 is clipped to seven steps of 0.5
    tensor([[  0.5000, 100.0000,  -1.0000,   3.5000]])
    """

    id: ClassVar[str] = "feature"
    num_bits: int
    scale: Tensor
    outliers: Tensor

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise InvalidInputError(
                "feature codec", expected="2 to 8 bits", found=self.num_bits, remedy="Choose another width."
            )
        if self.scale.ndim != 2 or self.scale.dtype != torch.bfloat16 or not is_positive(self.scale):
            raise InvalidInputError(
                "feature codec",
                expected="scales [sources, features] in bf16, finite, positive and normal",
                found=f"{list(self.scale.shape)} in {self.scale.dtype}",
                remedy="Calibrate again.",
            )
        if not _is_ascending(self.outliers, self.scale.shape[1]):
            raise InvalidInputError(
                "feature codec",
                expected=f"ascending int64 outlier indices below {self.scale.shape[1]}",
                found=f"{self.outliers.tolist()[:8]} in {self.outliers.dtype}",
                remedy="Calibrate again.",
            )

    @cached_property
    def num_sources(self) -> int:
        return len(self.scale)

    @property
    def granularity(self) -> int:
        return 1

    @property
    def _num_coded(self) -> int:
        return self.scale.shape[1] - len(self.outliers)

    @cached_property
    def _reciprocal(self) -> Tensor:
        return (1.0 / self.scale.float()).index_fill_(1, self.outliers, 0.0)  # nothing clips where an outlier is

    @cached_property
    def _moves(self) -> tuple[Tensor, Tensor]:
        """The last K features, where no outliers themselves, take the slots of the outliers before them."""
        holes = self.outliers[self.outliers < self._num_coded]
        last = torch.arange(self._num_coded, self.scale.shape[1], device=self.scale.device)
        return holes, last[~torch.isin(last, self.outliers)]

    def row_nbytes(self, num_features: int) -> int:
        if num_features != self.scale.shape[1]:
            raise InvalidInputError(
                "feature codec",
                expected=f"{self.scale.shape[1]} features, as calibrated",
                found=num_features,
                remedy="Use the codec of this site.",
            )
        return 2 * len(self.outliers) + ops.packed_nbytes(self._num_coded, self.num_bits)

    def num_features(self, row_nbytes: int) -> int:
        return self.scale.shape[1]  # more features may take as many bytes, but not with this codec

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        torch.ops.narrowcast.feature_encode(
            x_TE, self._reciprocal[source], self.outliers, *self._moves, self.num_bits, out_TB, stats
        )

    def _decode_sum(self, payloads_RTB: Tensor, sources: slice, out_TE: Tensor) -> None:
        torch.ops.narrowcast.feature_decode_sum(
            payloads_RTB, self.scale[sources], self.outliers, *self._moves, self.num_bits, out_TE
        )

    def _make_kernel(self) -> cpu.Kernel | None:
        guard = guard_for(self.scale.shape[1], len(self.outliers), self.num_bits)
        return cpu.feature(self.num_bits, self.scale, self._reciprocal, self.outliers, *self._moves, guard)

    def _features(self, start: int, stop: int) -> "FeatureCodec":
        inside = (self.outliers >= start) & (self.outliers < stop)
        return FeatureCodec(
            num_bits=self.num_bits, scale=self.scale[:, start:stop].contiguous(), outliers=self.outliers[inside] - start
        )

    def _sources(self, ranks: tuple[int, ...]) -> "FeatureCodec":
        return FeatureCodec(num_bits=self.num_bits, scale=self.scale[list(ranks)], outliers=self.outliers)

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        # Half a step, or what lies beyond the largest code; the product x * (1 / scale) carries two roundings
        # (2 * 2**-24, relative), which may tip a value that lies that close to the middle of two codes.
        scale_E, x_TE, size_TE = self.scale[source].float(), x_TE.float(), x_TE.float().abs()
        largest = 2 ** (self.num_bits - 1) - 1
        bound_TE = torch.maximum(scale_E / 2 + size_TE * 2**-22, size_TE - largest * scale_E)
        eps = torch.finfo(torch.bfloat16).eps
        bound_TE[:, self.outliers] = torch.clamp(size_TE[:, self.outliers] * (eps / 2), min=2.0**-134)
        guard = guard_for(x_TE.shape[1], len(self.outliers), self.num_bits)
        if guard is None:
            return bound_TE
        guarded_T = far_out(x_TE, x_TE * self._reciprocal[source], self._num_coded, self.num_bits)
        return torch.where(guarded_T[:, None], group_error_bound(x_TE, *guard, True, False), bound_TE)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"num_bits": self.num_bits}, {"scale": self.scale, "outliers": self.outliers}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(num_bits=config["num_bits"], scale=tensors["scale"], outliers=tensors["outliers"])


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """Makes a `FeatureCodec` from calibrated ranges.

    `num_outliers`: None for E // 64, as the paper has it. `choose`: the features of the largest range summed
    over sources, or random ones (seeded: a baseline that shows what choosing is worth).
    """

    num_bits: int = 4
    num_outliers: int | None = None
    choose: Literal["range", "random"] = "range"

    def codec(self, ranges: Ranges) -> FeatureCodec:
        """Scales that let each feature's largest magnitude take the largest code."""
        num_features = ranges.low.shape[1]
        num_outliers = num_features // 64 if self.num_outliers is None else self.num_outliers
        if not 0 <= num_outliers <= num_features:
            raise InvalidInputError(
                "feature codec",
                expected=f"at most {num_features} outliers, one a feature",
                found=num_outliers,
                remedy="Choose fewer.",
            )
        if self.choose == "range":
            order = ranges.width.sum(dim=0).argsort(descending=True, stable=True)
        else:
            order = torch.randperm(num_features, generator=torch.Generator().manual_seed(RANDOM_SEED))
        return FeatureCodec(
            num_bits=self.num_bits,
            scale=_reaching(ranges.scale_largest / (2 ** (self.num_bits - 1) - 1)),
            outliers=order[:num_outliers].sort().values,
        )


def _reaching(scale: Tensor) -> Tensor:
    """Smallest normal BF16 not below `scale`, so that the largest value never clips for rounding alone."""
    return ops.bfloat16_up(scale.float().clamp(min=torch.finfo(torch.bfloat16).smallest_normal))


def _is_ascending(outliers: Tensor, num_features: int) -> bool:
    if outliers.ndim != 1 or outliers.dtype != torch.int64:
        return False
    inside = ((outliers >= 0) & (outliers < num_features)).all()
    return bool(inside and (outliers.diff() > 0).all())
