"""What operators are made of: `operator` declares one, the rest is arithmetic that several of them share.

A codec's file declares its operators, each once with its schema, its shape function and its reference kernel in
plain PyTorch. A faster kernel registers for a device under the same name and must equal the reference bit for bit
(docs/formats.md says what every byte means). Operators write into buffers of their caller.

Shapes: T tokens, E features, N codes of a token, B payload bytes, R ranks.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

assert sys.byteorder == "little", "payloads are little-endian and written as the host stores them"

SATURATED, NON_FINITE, GUARDED = 0, 1, 2  # places in `stats`, int64 [3]

# A BF16 NaN that no conversion produces (those give 0x7FC0, or 0xFFFF). In the first outlier's place it
# announces a token that is coded differently in the same number of bytes.
GUARD_MARK = 0xFFC1

_library = torch.library.Library("narrowcast", "DEF")


def operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare `schema` with the decorated function as its kernel wherever no faster one is registered."""

    def register(reference: Callable[..., None]) -> Callable[..., None]:
        _library.define(schema)
        name = schema.split("(")[0]
        _library.impl(name, reference, "CompositeExplicitAutograd")
        _library.impl(name, lambda *_: None, "Meta")  # the buffers have their shapes already
        return reference

    return register


def planes_of(num_bits: int) -> list[tuple[int, int]]:
    """The bit planes of a code as (lowest bit, width), widths 8, 4, 2 and 1: 7 bits are 4 + 2 + 1."""
    planes, low = [], 0
    for width in (8, 4, 2, 1):
        if num_bits & width:
            planes.append((low, width))
            low += width
    return planes


def packed_nbytes(num_codes: int, num_bits: int) -> int:
    """Bytes of `num_codes` packed codes: each plane is rounded up to whole bytes."""
    return sum(-(-num_codes * width // 8) for _, width in planes_of(num_bits))


def pack(codes_TN: Tensor, num_bits: int) -> Tensor:
    """Pack uint8 codes [T, N] below 2**num_bits into uint8 [T, packed_nbytes(N, num_bits)].

    A plane of width w takes ceil(N * w / 8) bytes, and byte j holds the pieces j, j + bytes, j + 2 * bytes, ...
    from its low bits up: halves pack with halves, never neighbours, so that kernels need no shuffles.
    """
    num_tokens, num_codes = codes_TN.shape
    planes = []
    for low, width in planes_of(num_bits):
        per_byte, nbytes = 8 // width, -(-num_codes * width // 8)
        pieces = codes_TN.new_zeros(num_tokens, per_byte * nbytes)
        pieces[:, :num_codes] = codes_TN >> low & (1 << width) - 1
        plane = codes_TN.new_zeros(num_tokens, nbytes)
        for place in range(per_byte):
            plane |= pieces[:, place * nbytes : (place + 1) * nbytes] << place * width
        planes.append(plane)
    return torch.cat(planes, dim=1)


def unpack(packed_TB: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Undo `pack`: uint8 codes [T, num_codes]."""
    codes_TN = packed_TB.new_zeros(packed_TB.shape[0], num_codes)
    start = 0
    for low, width in planes_of(num_bits):
        per_byte, nbytes = 8 // width, -(-num_codes * width // 8)
        plane = packed_TB[:, start : start + nbytes]
        pieces = torch.cat([plane >> place * width & (1 << width) - 1 for place in range(per_byte)], dim=1)
        codes_TN |= pieces[:, :num_codes] << low
        start += nbytes
    return codes_TN


def not_finite(x: Tensor) -> Tensor:
    """Where `x` is inf or NaN."""
    return (x - x) != 0  # NaN, unless x is finite: half the passes of isfinite


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
