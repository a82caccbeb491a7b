"""Blocks of GGUF to codes: the types whose codes can be kept, and all others repacked to 8 bits.

Shapes: N rows, B blocks of a row, `block_NBb` their bytes, G groups of 32 columns.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowcast.weights.formats import Q4_0, Q4_1, Q8_0, GroupedCodes, WeightFormat
from narrowcast.weights.quantize import quantize_int8

OTHER_FILE = "Choose another file of this model, such as one in Q4_0, Q8_0 or Q4_K_M."
SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def codes_of(kind: Any, block_NBb: Tensor) -> GroupedCodes:
    """The codes of blocks, uint8 [N, B, bytes of a block]. `format_of` tells their format."""
    if (kept := KEPT.get(kind.name)) is not None:
        return kept[1](block_NBb)
    return quantize_int8(values_of(kind, block_NBb))


def format_of(kind: Any) -> WeightFormat | None:
    """The format that blocks of a type are given in; None for plain values."""
    if kind.name in PLAIN:
        return None
    return KEPT[kind.name][0] if kind.name in KEPT else Q8_0


def values_of(kind: Any, block_NBb: Tensor) -> Tensor:
    """The values of blocks, [N, K]: of their own dtype if they are plain, else FP32."""
    from gguf import quants

    dtype = PLAIN.get(kind.name)
    if not block_NBb.numel():
        return torch.empty(len(block_NBb), block_NBb.shape[1] * block_size(kind)[0], dtype=dtype)
    if dtype is not None:
        return block_NBb.flatten(1).view(dtype)
    if kind.name == "Q6_K":  # in most files of 4 bits, and the package takes three times as long
        return _q6_k(block_NBb)
    with np.errstate(all="ignore"):  # scales of a broken file may be infinite
        return torch.from_numpy(quants.dequantize(block_NBb.flatten(1).numpy(), kind))


def block_size(kind: Any) -> tuple[int, int]:
    """The columns and the bytes of a block."""
    from gguf import GGML_QUANT_SIZES

    size, nbytes = GGML_QUANT_SIZES[kind]
    return size, nbytes


@cache
def readable(kind: Any) -> bool:
    """True for types that the installed package can turn into values."""
    try:
        values_of(kind, torch.zeros(1, 1, block_size(kind)[1], dtype=torch.uint8))
    except NotImplementedError:
        return False
    return True


def note_of(kind: Any) -> str:
    """The difference of codes of a type from those in the file, in words; empty if there is none."""
    if kind.name in PLAIN or kind.name in EXACT:
        return ""
    if kind.name == "Q4_K":
        return f"Q4_K is kept as {Q4_1.name}: scales and minima rounded to FP16, by 1/2048 of each at most"
    if kind.name == "Q5_0":
        return f"Q5_0 is kept as {Q8_0.name}, the same values in more bits"
    return f"{kind.name} is repacked to {Q8_0.name}, values rounded by 1/225 of a group's largest at most"


def _q4_0(block_NBb: Tensor) -> GroupedCodes:
    """FP16 scale, then 16 bytes: codes 0 to 15 in the low halves, 16 to 31 in the high ones."""
    return GroupedCodes(Q4_0, _halves(block_NBb[..., 2:], 16), _fp16(block_NBb, 0))


def _q4_1(block_NBb: Tensor) -> GroupedCodes:
    """FP16 scale, FP16 minimum, codes as in Q4_0."""
    return GroupedCodes(Q4_1, _halves(block_NBb[..., 4:], 16), _fp16(block_NBb, 0), _fp16(block_NBb, 2))


def _q8_0(block_NBb: Tensor) -> GroupedCodes:
    """FP16 scale, then 32 signed codes."""
    return GroupedCodes(Q8_0, (block_NBb[..., 2:] ^ 128).flatten(1), _fp16(block_NBb, 0))


def _q5_0(block_NBb: Tensor) -> GroupedCodes:
    """FP16 scale, 4 bytes with the fifth bits of the codes, the others as in Q4_0; code 16 is zero."""
    low_NBk = _halves(block_NBb[..., 6:], 16).unflatten(1, (-1, 32))
    high_NBk = ((block_NBb[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(2)
    return GroupedCodes(Q8_0, (low_NBk + 16 * high_NBk + (128 - 16)).flatten(1), _fp16(block_NBb, 0))


def _q4_k(block_NBb: Tensor) -> GroupedCodes:
    """FP16 scale and FP16 minimum of 256 columns; for its 8 groups 6 bits each to multiply them by; codes.

    Of the 12 bytes of factors, groups 0 to 3 have the low 6 bits of the first 4 (scales) and the next 4 (minima);
    groups 4 to 7 the 4 last ones (low halves scales, high ones minima) and the 2 high bits of the first 8.
    """
    scale_NB1, minimum_NB1 = _fp16(block_NBb, 0).float()[..., None], _fp16(block_NBb, 2).float()[..., None]
    first_NBg, second_NBg, third_NBg = block_NBb[..., 4:16].split(4, dim=-1)
    factors_NBg = torch.cat([first_NBg & 63, third_NBg & 15 | first_NBg >> 6 << 4], dim=-1)
    offsets_NBg = torch.cat([second_NBg & 63, third_NBg >> 4 | second_NBg >> 6 << 4], dim=-1)
    scales_NG = (scale_NB1 * factors_NBg).flatten(1).half()
    minima_NG = (minimum_NB1 * offsets_NBg).neg().flatten(1).half()
    return GroupedCodes(Q4_1, _halves(block_NBb[..., 16:], 32), scales_NG, minima_NG)


def _q6_k(block_NBb: Tensor) -> Tensor:
    """128 bytes with the low 4 bits of 256 codes, 64 with the high 2, 16 signed factors of the FP16 scale, that one.

    Of each 128 codes the first 64 are in the low halves of 64 bytes; 4 runs of 32 share the 32 bytes of high bits.
    """
    low_NBhk = _halves(block_NBb[..., :128], 64).reshape(*block_NBb.shape[:2], 2, 4, 32)
    high_NBhk = block_NBb[..., 128:192].reshape(*block_NBb.shape[:2], 2, 1, 32) >> SHIFTS & 3
    codes_NBgk = (low_NBhk | high_NBhk << 4).reshape(*block_NBb.shape[:2], 16, 16).float().sub_(32)
    factors_NBg = block_NBb[..., 192:208].contiguous().view(torch.int8)
    scales_NBg = _fp16(block_NBb, 208).float()[..., None] * factors_NBg
    return codes_NBgk.mul_(scales_NBg[..., None]).flatten(1)


def _halves(bytes_NBb: Tensor, run: int) -> Tensor:
    """Codes [N, K] of bytes: of each `run` of them first the low halves, then the high ones."""
    runs_NBrb = bytes_NBb.unflatten(-1, (-1, run))
    return torch.stack([runs_NBrb & 15, runs_NBrb >> 4], dim=-2).flatten(1)


def _fp16(block_NBb: Tensor, place: int) -> Tensor:
    return block_NBb[..., place : place + 2].reshape(-1).view(torch.float16).reshape(block_NBb.shape[:2])


KEPT: dict[str, tuple[WeightFormat, Callable[[Tensor], GroupedCodes]]] = {
    "Q4_0": (Q4_0, _q4_0),
    "Q4_1": (Q4_1, _q4_1),
    "Q8_0": (Q8_0, _q8_0),
    "Q5_0": (Q8_0, _q5_0),
    "Q4_K": (Q4_1, _q4_k),
}
EXACT = "Q4_0", "Q4_1", "Q8_0"
