"""Operators: each declared once with its schema, its shape function and its reference kernel in plain PyTorch.

A faster kernel registers for a device under the same name and must equal the reference bit for bit
(docs/formats.md says what every byte means). Operators write into buffers of their caller.

Shapes: T tokens, E features, N features coded as integers (E less the k outliers), B payload bytes, R ranks.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

assert sys.byteorder == "little", "payloads are little-endian and written as the host stores them"

SATURATED, NON_FINITE = 0, 1  # places in `stats`, int64 [2]

# A BF16 NaN that no conversion produces (those give 0x7FC0, or 0xFFFF). In the first outlier's place it
# announces a token that is coded differently in the same number of bytes.
GUARD_MARK = 0xFFC1

_library = torch.library.Library("narrowcast", "DEF")


def _operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare `schema` with the decorated function as its kernel wherever no faster one is registered."""

    def register(reference: Callable[..., None]) -> Callable[..., None]:
        _library.define(schema)
        name = schema.split("(")[0]
        _library.impl(name, reference, "CompositeExplicitAutograd")
        _library.impl(name, lambda *_: None, "Meta")  # the buffers have their shapes already
        return reference

    return register


@_operator("cast_encode(Tensor x, ScalarType dtype, Tensor(a!) out, Tensor(b!)? stats) -> ()")
def cast_encode(x_TE: Tensor, dtype: torch.dtype, out_TB: Tensor, stats: Tensor | None) -> None:
    """Round to `dtype` and store the bits; what is not finite afterwards becomes the canonical NaN."""
    values_TE = x_TE.to(dtype, copy=True)
    values_TE.masked_fill_(_not_finite(values_TE), torch.nan)
    out_TB.copy_(values_TE.view(torch.uint8))
    if stats is not None:
        stats[NON_FINITE] += _not_finite(x_TE).count_nonzero()


@_operator("cast_decode_sum(Tensor payloads, ScalarType dtype, Tensor(a!) out) -> ()")
def cast_decode_sum(payloads_RTB: Tensor, dtype: torch.dtype, out_TE: Tensor) -> None:
    """Sum the values of all ranks in fp32, in rank order."""
    _store_sum([_values(payload_TB, dtype) for payload_TB in payloads_RTB], out_TE)


@_operator(
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
    """One pass over all features as if none were an outlier, then as many moves as the outliers left holes."""
    num_outliers, num_coded = len(outliers_K), x_TE.shape[1] - len(outliers_K)
    largest, offset = 2 ** (num_bits - 1) - 1, 2 ** (num_bits - 1)
    x_TE = x_TE.float()
    not_finite_TE = _not_finite(x_TE)
    steps_TE = (x_TE * reciprocal_E).round_()
    codes_TE = steps_TE.clamp(-largest, largest)
    if stats is not None:
        clipped_TE = (codes_TE != steps_TE).masked_fill_(not_finite_TE, False)
        clipped_TE[:, outliers_K] = False
        stats[SATURATED] += clipped_TE.count_nonzero()
        stats[NON_FINITE] += not_finite_TE.count_nonzero()
    codes_TE.add_(offset).masked_fill_(not_finite_TE, 0)  # the free code point
    codes_TE[:, holes] = codes_TE[:, fillers]
    if num_outliers:
        outliers_TK = x_TE[:, outliers_K].bfloat16()
        outliers_TK.masked_fill_(_not_finite(outliers_TK), torch.nan)
        out_TB[:, : 2 * num_outliers] = outliers_TK.view(torch.uint8)
    out_TB[:, 2 * num_outliers :] = pack(codes_TE[:, :num_coded].to(torch.uint8), num_bits)


@_operator(
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
    """Decode each rank's payload with its own scales and sum in fp32, in rank order."""
    num_outliers, num_coded = len(outliers_K), scale_RE.shape[1] - len(outliers_K)
    offset = 2 ** (num_bits - 1)
    decoded = []
    for payload_TB, scale_E in zip(payloads_RTB, scale_RE, strict=True):
        codes_TN = unpack(payload_TB[:, 2 * num_outliers :], num_bits, num_coded)
        steps_TE = torch.zeros(out_TE.shape, device=payload_TB.device)
        steps_TE[:, :num_coded] = codes_TN.float().sub_(offset).masked_fill_(codes_TN == 0, torch.nan)
        steps_TE[:, fillers] = steps_TE[:, holes]
        values_TE = steps_TE.mul_(scale_E.float())
        if num_outliers:
            values_TE[:, outliers_K] = _values(payload_TB[:, : 2 * num_outliers], torch.bfloat16)
            first = payload_TB[:, 0].int() | payload_TB[:, 1].int() << 8
            values_TE.masked_fill_((first == GUARD_MARK)[:, None], torch.nan)
        decoded.append(values_TE)
    _store_sum(decoded, out_TE)


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


def _not_finite(x: Tensor) -> Tensor:
    return (x - x) != 0  # NaN, unless x is finite: half the passes of isfinite


def _values(payload_TB: Tensor, dtype: torch.dtype) -> Tensor:
    # A single row counts as contiguous whatever its stride, but a view of wider values needs an even one.
    return payload_TB.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _store_sum(decoded: list[Tensor], out_TE: Tensor) -> None:
    total_TE = decoded[0]
    for values_TE in decoded[1:]:
        total_TE = total_TE + values_TE
    out_TE.copy_(total_TE)
    out_TE.masked_fill_(out_TE.isnan(), torch.nan)  # which NaN a conversion gives depends on the CPU's vector width


def kernel_of(device: str) -> str:
    """Which kernels serve `device` ("cpu", "cuda"): "native", or "reference" for those of this file."""
    native = torch._C._dispatch_has_kernel_for_dispatch_key("narrowcast::feature_encode", device.upper())
    return "native" if native else "reference"
