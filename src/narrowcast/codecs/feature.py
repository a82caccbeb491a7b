"""`feature`: a few outlier features in BF16, all others as small integers with static scales.

The method of arXiv 2411.07942 (Dong et al.): calibrate once, then no scale travels. With E = 256 features,
4 bits and E // 64 outliers a value takes (252 * 4 + 4 * 16) / 256 = 4.1875 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from narrowcast.codecs import arithmetic, packing, spelling
from narrowcast.codecs.base import Codec, is_positive
from narrowcast.codecs.feature_reference import Guard, far_out, feature_decode_sum, feature_encode, guard_for
from narrowcast.codecs.group import group_error_bound
from narrowcast.codecs.recipes import Ranges
from narrowcast.codecs.tables import PerDevice
from narrowcast.errors import InvalidInputError

RANDOM_SEED = 241107942  # nobody's default, so that no other random choice repeats ours


class FeatureTables(NamedTuple):
    """Look-ups of kernels: bf16 `scale` and fp32 `reciprocal` [R, E], zero for outliers; int64 `outliers` [K].

    The last K features, where no outliers themselves (`fillers`), take the slots of the outliers before them (`holes`).
    """

    scale: Tensor
    reciprocal: Tensor
    outliers: Tensor
    holes: Tensor
    fillers: Tensor


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
        _check_bits(self.num_bits)
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
    def calibrated_features(self) -> int:
        return self.scale.shape[1]

    @property
    def _num_coded(self) -> int:
        return self.scale.shape[1] - len(self.outliers)

    @cached_property
    def tables(self) -> PerDevice[FeatureTables]:
        """The look-ups of kernels."""
        last = torch.arange(self._num_coded, self.scale.shape[1], device=self.scale.device)
        return PerDevice(
            FeatureTables(
                scale=self.scale,
                reciprocal=(1.0 / self.scale.float()).index_fill_(1, self.outliers, 0.0),  # an outlier never clips
                outliers=self.outliers,
                holes=self.outliers[self.outliers < self._num_coded],
                fillers=last[~torch.isin(last, self.outliers)],
            )
        )

    @cached_property
    def guard(self) -> Guard | None:
        """The code of tokens far out of range; None where there is no room for it."""
        return guard_for(self.scale.shape[1], len(self.outliers), self.num_bits)

    def row_nbytes(self, num_features: int) -> int:
        if num_features != self.scale.shape[1]:
            raise InvalidInputError(
                "feature codec",
                expected=f"{self.scale.shape[1]} features, as calibrated",
                found=num_features,
                remedy="Use the codec of this site.",
            )
        return 2 * len(self.outliers) + packing.packed_nbytes(self._num_coded, self.num_bits)

    def num_features(self, row_nbytes: int) -> int:
        return self.scale.shape[1]  # more features may take as many bytes, but not with this codec

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        tables = self.tables.on(x_TE.device)
        moves = tables.outliers, tables.holes, tables.fillers
        feature_encode(x_TE, tables.reciprocal[source], *moves, self.num_bits, self.guard, out_TB, stats)

    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        tables = self.tables.on(payloads_RTB.device)
        scale_RE = tables.scale[first_source : first_source + len(payloads_RTB)]
        moves = tables.outliers, tables.holes, tables.fillers
        feature_decode_sum(payloads_RTB, scale_RE, *moves, self.num_bits, self.guard, out_TE)

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
        if self.guard is None:
            return bound_TE
        products_TE = x_TE * self.tables.on(x_TE.device).reciprocal[source]
        guarded_T = far_out(x_TE, products_TE, self._num_coded, self.num_bits)
        return torch.where(guarded_T[:, None], group_error_bound(x_TE, *self.guard, True, False), bound_TE)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"num_bits": self.num_bits}, {"scale": self.scale, "outliers": self.outliers}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(num_bits=config["num_bits"], scale=tensors["scale"], outliers=tensors["outliers"])


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe(spelling.Spelt):
    """Makes a `FeatureCodec` from calibrated ranges.

    `num_outliers`: None for E // 64, as the paper has it. `choose`: the features of the largest range summed
    over sources, or random ones (seeded: a baseline that shows what choosing is worth).
    """

    id: ClassVar[str] = "feature"
    num_bits: int = field(metadata=spelling.key("bits"))
    num_outliers: int | None = field(default=None, metadata=spelling.key("outliers"))
    choose: Literal["range", "random"] = "range"

    def __post_init__(self) -> None:
        _check_bits(self.num_bits)

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
            order = order.to(ranges.low.device)
        return FeatureCodec(
            num_bits=self.num_bits,
            scale=_reaching(ranges.scale_largest / (2 ** (self.num_bits - 1) - 1)),
            outliers=order[:num_outliers].sort().values,
        )


def _check_bits(num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise InvalidInputError("feature codec", expected="2 to 8 bits", found=num_bits, remedy="Choose another width.")


def _reaching(scale: Tensor) -> Tensor:
    """Smallest normal BF16 not below `scale`, so that the largest value never clips for rounding alone."""
    return arithmetic.bfloat16_up(scale.float().clamp(min=torch.finfo(torch.bfloat16).smallest_normal))


def _is_ascending(outliers: Tensor, num_features: int) -> bool:
    if outliers.ndim != 1 or outliers.dtype != torch.int64:
        return False
    inside = ((outliers >= 0) & (outliers < num_features)).all()
    return bool(inside and (outliers.diff() > 0).all())
