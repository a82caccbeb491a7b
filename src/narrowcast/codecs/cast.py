"""`cast`: values rounded to bf16, fp16 or fp32. The baseline, and the carrier of what is not compressed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from narrowcast.codecs import arithmetic
from narrowcast.codecs.base import FLOAT_DTYPES, NON_FINITE
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.errors import InvalidInputError

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def cast_encode(x_TE: Tensor, dtype: torch.dtype, out_TB: Tensor, stats: Tensor | None) -> None:
    """Round to `dtype` and store the bits; what is not finite afterwards becomes the canonical NaN."""
    values_TE = x_TE.to(dtype, copy=True)
    values_TE.masked_fill_(arithmetic.not_finite(values_TE), torch.nan)
    out_TB.copy_(values_TE.view(torch.uint8))
    if stats is not None:
        stats[NON_FINITE] += arithmetic.not_finite(x_TE).count_nonzero()


def cast_decode_sum(payloads_RTB: Tensor, dtype: torch.dtype, out_TE: Tensor) -> None:
    """Sum the values of all ranks in fp32, in rank order."""
    arithmetic.store_sum([arithmetic.values(payload_TB, dtype) for payload_TB in payloads_RTB], out_TE)


@dataclass(frozen=True, kw_only=True)
class CastCodec(DynamicCodec):
    """Each value as a `dtype`, little-endian: 16 bits a value, or 32.

    Finite values stay finite in bf16 and fp32; in fp16 those beyond 65504 become NaN.

    >>> codec = CastCodec(dtype=torch.bfloat16)
    >>> payload = codec.encode(torch.tensor([[1.0, -2.0]]), source=0)
    >>> payload.tolist()
    [[128, 63, 0, 192]]
    >>> codec.decode(payload, source=0)
    tensor([[ 1., -2.]])
    """

    id: ClassVar[str] = "cast"
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise InvalidInputError(
                "cast codec",
                expected="torch.bfloat16, torch.float16 or torch.float32",
                found=self.dtype,
                remedy="Choose one of them.",
            )

    @property
    def granularity(self) -> int:
        return 1

    def row_nbytes(self, num_features: int) -> int:
        return num_features * self.dtype.itemsize

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        cast_encode(x_TE, self.dtype, out_TB, stats)

    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        cast_decode_sum(payloads_RTB, self.dtype, out_TE)

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        # Round to nearest: half a unit in the last place, and half the smallest subnormal near zero.
        info = torch.finfo(self.dtype)
        return torch.clamp(x_TE.float().abs() * (info.eps / 2), min=info.smallest_normal * info.eps / 2)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"dtype": str(self.dtype).removeprefix("torch.")}, {}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(dtype=_NAMES[config["dtype"]])
