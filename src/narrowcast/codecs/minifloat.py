"""`minifloat`: FP8, FP6 or FP4 values with a scale for each block of features, or for each token.

The formats of b12x, FlashInfer and vLLM (FP8 with a scale a group), of the OCP Microscaling specification v1.0
(MXFP8, MXFP6, MXFP4) and, with a scale for each token in the place of one for each tensor, NVIDIA's NVFP4.

Shapes: G blocks of S features; the last one may be short.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from narrowcast.codecs import arithmetic, packing, spelling
from narrowcast.codecs.base import NON_FINITE, SATURATED
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.codecs.floats import E4M3, FORMATS, FloatFormat
from narrowcast.errors import InvalidInputError

# How scales are stored: "bf16", "e8m0" (powers of two), or "e4m3" on top of one BF16 scale a token.
Scale = Literal["bf16", "e8m0", "e4m3"]
SCALE_NBYTES = {"bf16": 2, "e8m0": 1, "e4m3": 1}

SMALLEST_SCALE = torch.finfo(torch.bfloat16).smallest_normal  # so that its reciprocal is finite
SMALLEST_TOKEN_SCALE = 2.0**-120  # the same for its product with SMALLEST_BLOCK_SCALE
SMALLEST_BLOCK_SCALE = 2.0**-6  # E4M3's smallest normal number, below which rounding a scale would be coarse
E8M0_NAN = 0xFF


def minifloat_encode(
    x_TE: Tensor, element: str, scale: Scale, block_size: int, out_TB: Tensor, stats: Tensor | None
) -> None:
    """Find each block's scale, then round its values divided by the scale as it will be read."""
    num_features, form = x_TE.shape[1], FORMATS[element]
    x_TGS = _blocks(x_TE, block_size)
    bad_TGS = arithmetic.not_finite(x_TGS)
    x_TGS = x_TGS.masked_fill(bad_TGS, 0)
    scales_TB, reciprocal_TG = _scales(x_TGS.abs().amax(dim=2), scale, form)
    x_TGS.mul_(reciprocal_TG[:, :, None])
    codes_TGS = form.round(x_TGS)
    if stats is not None:
        stats[SATURATED] += (codes_TGS > form.largest_code).count_nonzero()
        stats[NON_FINITE] += bad_TGS.count_nonzero()
    codes_TGS.clamp_(max=form.largest_code).add_(x_TGS.signbit(), alpha=form.sign)
    if form.nan_code is None:
        bad_TG1 = bad_TGS.any(dim=2, keepdim=True)
        codes_TGS.masked_fill_(bad_TG1, 0)
        _mark(scales_TB, bad_TG1[:, :, 0], scale)
    else:
        codes_TGS.masked_fill_(bad_TGS, form.nan_code)
    codes_TE = codes_TGS.flatten(1)[:, :num_features].to(torch.uint8)
    torch.cat([scales_TB, packing.pack(codes_TE, form.num_bits)], dim=1, out=out_TB)


def minifloat_decode_sum(payloads_RTB: Tensor, element: str, scale: Scale, block_size: int, out_TE: Tensor) -> None:
    """Decode each rank's payload and sum in fp32, in rank order."""
    num_features, form = out_TE.shape[1], FORMATS[element]
    num_blocks = -(-num_features // block_size)
    values = form.values(out_TE.device)
    decoded = []
    for payload_TB in payloads_RTB:
        start = _scales_nbytes(num_blocks, scale)
        codes_TE = packing.unpack(payload_TB[:, start:], form.num_bits, num_features)
        values_TGS = _blocks(values[codes_TE.int()], block_size)
        values_TGS = values_TGS * _read_scales(payload_TB[:, :start], scale)[:, :, None]
        decoded.append(values_TGS.flatten(1)[:, :num_features])
    arithmetic.store_sum(decoded, out_TE)


def _blocks(x_TE: Tensor, block_size: int) -> Tensor:
    """[T, G, S] in fp32, zeros at the end of the last block."""
    num_tokens, num_features = x_TE.shape
    return pad(x_TE.float(), (0, -num_features % block_size)).reshape(
        num_tokens, -(-num_features // block_size), block_size
    )


def _scales_nbytes(num_blocks: int, scale: Scale) -> int:
    return num_blocks * SCALE_NBYTES[scale] + 2 * (scale == "e4m3" and num_blocks > 0)


def _scales(largest_TG: Tensor, scale: Scale, form: FloatFormat) -> tuple[Tensor, Tensor]:
    """The scales' bytes, and what values are multiplied with, fp32 [T, G]."""
    if scale == "bf16":
        scale_TG = arithmetic.bfloat16_up((largest_TG / form.largest).clamp_(min=SMALLEST_SCALE))
        return scale_TG.view(torch.uint8), 1.0 / scale_TG.float()
    if scale == "e8m0":
        # floor(log2(largest)) - emax, biased by 127, is the exponent's field less emax.
        exponent_TG = ((largest_TG.view(torch.int32) >> 23) - form.largest_exponent).clamp_(min=0)
        return exponent_TG.to(torch.uint8), (254 - exponent_TG << 23).view(torch.float32)
    token_T1 = largest_TG.amax(dim=1, keepdim=True) / (form.largest * E4M3.largest)
    token_T1 = arithmetic.bfloat16_up(token_T1.clamp_(min=SMALLEST_TOKEN_SCALE))
    wanted_TG = largest_TG / form.largest / token_T1.float()
    codes_TG = E4M3.round(wanted_TG.clamp_(SMALLEST_BLOCK_SCALE, E4M3.largest))
    reciprocal_TG = 1.0 / token_T1.float() / E4M3.values(codes_TG.device)[codes_TG]
    return torch.cat([token_T1.view(torch.uint8), codes_TG.to(torch.uint8)], dim=1), reciprocal_TG


def _mark(scales_TB: Tensor, bad_TG: Tensor, scale: Scale) -> None:
    """Write NaN for the scales of bad blocks."""
    if scale == "bf16":
        scales_TB.view(torch.bfloat16).masked_fill_(bad_TG, torch.nan)
    elif scale == "e8m0":
        scales_TB.masked_fill_(bad_TG, E8M0_NAN)
    else:
        assert E4M3.nan_code is not None
        scales_TB[:, 2:].masked_fill_(bad_TG, E4M3.nan_code)


def _read_scales(scales_TB: Tensor, scale: Scale) -> Tensor:
    """Scales fp32 [T, G] from their bytes."""
    if scale == "bf16":
        return arithmetic.values(scales_TB, torch.bfloat16)
    if scale == "e8m0":
        exponent_TG = scales_TB.to(torch.int32)
        bits_TG = torch.where(exponent_TG == 0, 1 << 22, exponent_TG << 23)  # 2**-127 is subnormal
        return bits_TG.view(torch.float32).masked_fill_(exponent_TG == E8M0_NAN, torch.nan)
    block_TG = E4M3.values(scales_TB.device)[scales_TB[:, 2:].int()]
    return arithmetic.values(scales_TB[:, :2], torch.bfloat16) * block_TG


@dataclass(frozen=True, kw_only=True)
class MinifloatCodec(DynamicCodec):
    """Values in `element` ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1"), a scale for every `block_size` features.

    `scale`: "bf16" (the largest magnitude over the format's largest, rounded up; `block_size` None for one scale a
    token), "e8m0" (a power of two for 32 features: OCP MX) or "e4m3" (for 16, with a BF16 scale a token: NVFP4).
    A value that is not finite comes out as NaN: alone in FP8; in FP6 and FP4, with its block.

    >>> codec = MinifloatCodec(element="e2m1", scale="e8m0", block_size=32)
    >>> payload = codec.encode(torch.tensor([[1.0, -2.2, 0.3, 5.0]]), source=0)
    >>> payload.tolist()  # 2**0, four codes
    [[127, 18, 108]]
    >>> codec.decode(payload, source=0, num_features=4)
    tensor([[ 1.0000, -2.0000,  0.5000,  4.0000]])
    """

    id: ClassVar[str] = "minifloat"
    element: str
    scale: Scale = "bf16"
    block_size: int | None = field(default=None, metadata=spelling.key("size"))

    def __post_init__(self) -> None:
        sizes = {"bf16": (None, 16, 32, 64, 128), "e8m0": (32,), "e4m3": (16,)}
        if self.element not in FORMATS or self.scale not in sizes or self.block_size not in sizes[self.scale]:
            raise InvalidInputError(
                "minifloat codec",
                expected=f"an element of {', '.join(FORMATS)}, a scale of {', '.join(get_args(Scale))}, blocks of 16"
                " to 128 or None for bf16, of 32 for e8m0, of 16 for e4m3",
                found=self,
                remedy="Choose other parameters.",
            )

    @property
    def form(self) -> FloatFormat:
        """The numbers that elements can be."""
        return FORMATS[self.element]

    @property
    def granularity(self) -> int | None:
        return None if self.scale == "e4m3" else self.block_size

    @property
    def nan_reach(self) -> int | None:
        return self.block_size if self.form.nan_code is None else 1

    def row_nbytes(self, num_features: int) -> int:
        num_blocks = -(-num_features // self._size(num_features))
        return _scales_nbytes(num_blocks, self.scale) + packing.packed_nbytes(num_features, self.form.num_bits)

    def _size(self, num_features: int) -> int:
        return self.block_size or max(num_features, 1)

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        size = self._size(x_TE.shape[1])
        minifloat_encode(x_TE, self.element, self.scale, size, out_TB, stats)

    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        size = self._size(out_TE.shape[1])
        minifloat_decode_sum(payloads_RTB, self.element, self.scale, size, out_TE)

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        if not x_TE.numel():
            return x_TE.float()
        # Half the distance of the format's numbers, or what lies beyond the largest; the product with the
        # reciprocal carries three roundings (2**-24 each, relative) at most.
        form, x_TGS = self.form, _blocks(x_TE, self._size(x_TE.shape[1])).abs()
        scales_TB, reciprocal_TG = _scales(x_TGS.amax(dim=2), self.scale, form)
        scale_TG1 = _read_scales(scales_TB, self.scale)[:, :, None]
        half_TGS = form.quantum(x_TGS * reciprocal_TG[:, :, None]) * scale_TG1 / 2
        bound_TGS = torch.maximum(half_TGS, x_TGS - form.largest * scale_TG1) + x_TGS * 2**-21
        return bound_TGS.flatten(1)[:, : x_TE.shape[1]]
