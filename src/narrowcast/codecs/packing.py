"""Codes of a few bits packed into bytes, and back.

Shapes: T tokens, N codes of a token, B payload bytes.
"""

from torch import Tensor, cat


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
    return cat(planes, dim=1)


def unpack(packed_TB: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Undo `pack`: uint8 codes [T, num_codes]."""
    codes_TN = packed_TB.new_zeros(packed_TB.shape[0], num_codes)
    start = 0
    for low, width in planes_of(num_bits):
        per_byte, nbytes = 8 // width, -(-num_codes * width // 8)
        plane = packed_TB[:, start : start + nbytes]
        pieces = cat([plane >> place * width & (1 << width) - 1 for place in range(per_byte)], dim=1)
        codes_TN |= pieces[:, :num_codes] << low
        start += nbytes
    return codes_TN
