"""FP32 arithmetic that several codecs share: directed rounding to BF16, bytes read as values, sums over ranks.

Shapes: T tokens, E features, B payload bytes.
"""

import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "payloads are little-endian and written as the host stores them"


def not_finite(x: Tensor) -> Tensor:
    """A mask of the values that are inf or NaN."""
    return (x - x) != 0  # NaN, unless x is finite: half the passes of isfinite


def perhaps_any(mask: Tensor) -> bool:
    """False where there are certainly none: elsewhere than on the CPU, asking would wait for the device."""
    return not mask.is_cpu or bool(mask.any())


def bfloat16_up(x: Tensor) -> Tensor:
    """The smallest BF16 not below fp32 `x`, which is not negative."""
    return (x.contiguous().view(torch.int32) + 0xFFFF >> 16).to(torch.int16).view(torch.bfloat16)


def bfloat16_down(x: Tensor) -> Tensor:
    """The largest BF16 not above fp32 `x`: the magnitude is cut, or rounded up where `x` is negative."""
    bits = x.contiguous().view(torch.int32)
    return (bits + (bits >> 31 & 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def values(payload_TB: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `payload_TB` read as `dtype`, in fp32."""
    # A single row counts as contiguous whatever its stride, but a view of wider values needs an even one.
    return payload_TB.clone(memory_format=torch.contiguous_format).view(dtype).float()


def store_sum(decoded: list[Tensor], out_TE: Tensor) -> None:
    """Add the values of all ranks up in fp32, in rank order, and round once to the dtype of `out_TE`."""
    total_TE = decoded[0]
    for values_TE in decoded[1:]:
        total_TE = total_TE + values_TE
    out_TE.copy_(total_TE)
    out_TE.masked_fill_(out_TE.isnan(), torch.nan)  # which NaN a conversion gives depends on the CPU's vector width
