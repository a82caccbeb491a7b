"""Lloyd-Max quantizers of the standard normal distribution, of 1 to 8 bits.

J. Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory 6 (1960); S. Lloyd, "Least squares
quantization in PCM", IEEE Transactions on Information Theory 28 (1982): each level is the mean of its cell, each edge
of a cell the middle between two levels. Of symmetric levels only the positive half stands here. The numbers are part of
a byte format and stand as they are; `tests/test_allocated_codec.py` derives them again.
"""

from functools import cache

import torch
from torch import Tensor

UNIT = 4096  # levels are whole multiples of 1 / UNIT, hence edges of 1 / (2 * UNIT): FP32 holds both exactly

_LEVELS: dict[int, tuple[int, ...]] = {
    1: (3268,),
    2: (
        1855,
        6187,
    ),
    3: (
        1004,
        3097,
        5505,
        8814,
    ),
    4: (
        526,
        1589,
        2690,
        3860,
        5146,
        6628,
        8475,
        11193,
    ),
    5: (
        270,
        811,
        1357,
        1912,
        2478,
        3060,
        3664,
        4296,
        4964,
        5678,
        6456,
        7321,
        8310,
        9493,
        11023,
        13356,
    ),
    6: (
        137,
        411,
        685,
        961,
        1238,
        1517,
        1798,
        2082,
        2370,
        2661,
        2957,
        3258,
        3565,
        3880,
        4201,
        4532,
        4873,
        5226,
        5592,
        5973,
        6373,
        6794,
        7240,
        7717,
        8231,
        8793,
        9417,
        10122,
        10946,
        11950,
        13273,
        15336,
    ),
    7: (
        69,
        207,
        345,
        483,
        621,
        760,
        898,
        1038,
        1177,
        1317,
        1458,
        1599,
        1740,
        1883,
        2026,
        2170,
        2315,
        2461,
        2608,
        2756,
        2905,
        3056,
        3208,
        3361,
        3516,
        3673,
        3832,
        3992,
        4155,
        4319,
        4486,
        4656,
        4828,
        5004,
        5182,
        5364,
        5549,
        5738,
        5932,
        6129,
        6332,
        6540,
        6754,
        6974,
        7201,
        7436,
        7679,
        7932,
        8194,
        8469,
        8757,
        9060,
        9381,
        9722,
        10088,
        10482,
        10911,
        11385,
        11915,
        12522,
        13238,
        14121,
        15298,
        17161,
    ),
    8: (
        35,
        104,
        173,
        242,
        311,
        381,
        450,
        519,
        589,
        658,
        728,
        797,
        867,
        937,
        1007,
        1077,
        1147,
        1217,
        1287,
        1357,
        1428,
        1499,
        1570,
        1641,
        1712,
        1783,
        1854,
        1926,
        1998,
        2070,
        2142,
        2215,
        2288,
        2361,
        2434,
        2508,
        2581,
        2655,
        2730,
        2804,
        2879,
        2955,
        3030,
        3106,
        3183,
        3259,
        3336,
        3414,
        3492,
        3570,
        3649,
        3728,
        3808,
        3888,
        3969,
        4050,
        4131,
        4214,
        4296,
        4380,
        4464,
        4549,
        4634,
        4720,
        4807,
        4894,
        4982,
        5071,
        5161,
        5251,
        5343,
        5435,
        5528,
        5623,
        5718,
        5814,
        5911,
        6010,
        6110,
        6210,
        6313,
        6416,
        6521,
        6627,
        6735,
        6844,
        6955,
        7068,
        7183,
        7299,
        7418,
        7538,
        7661,
        7786,
        7914,
        8044,
        8177,
        8313,
        8452,
        8594,
        8740,
        8890,
        9044,
        9202,
        9365,
        9533,
        9706,
        9886,
        10072,
        10265,
        10466,
        10676,
        10896,
        11127,
        11370,
        11627,
        11901,
        12193,
        12508,
        12850,
        13224,
        13639,
        14107,
        14646,
        15285,
        16079,
        17148,
        18856,
    ),
}

MAX_BITS = max(_LEVELS)


def levels(num_bits: int) -> Tensor:
    """The positive levels, fp32 [2 ** (num_bits - 1)], ascending."""
    return torch.tensor(_LEVELS[num_bits], dtype=torch.float32) / UNIT


def edges(num_bits: int) -> Tensor:
    """Where one positive level's cell ends and the next one's begins, fp32 [2 ** (num_bits - 1) - 1]."""
    positive = levels(num_bits)
    return (positive[1:] + positive[:-1]) / 2


def distortion() -> Tensor:
    """Mean square error of a standard normal value coded in 0 to 8 bits, fp64 [9]: 1, 0.3634, 0.1175, ..."""
    return torch.tensor([1.0, *(_distortion(num_bits) for num_bits in _LEVELS)], dtype=torch.float64)


def _distortion(num_bits: int) -> float:
    """1 - E[level ** 2], as each level is the mean of its cell."""
    positive, normal = levels(num_bits).double(), torch.distributions.Normal(0.0, 1.0)
    ends = torch.cat([torch.zeros(1), edges(num_bits), torch.full((1,), 40.0)]).double()
    mass = normal.cdf(ends[1:]) - normal.cdf(ends[:-1])
    return 1 - float(2 * (mass * positive.square()).sum())


@cache
def tables() -> tuple[Tensor, Tensor, Tensor]:
    """What kernels look up, a row for each width.

    Levels by code, fp32 [8, 256]; edges, infinity behind them, fp32 [8, 128]; and how many edges there are up to
    place / 64, uint8 [8, 512]: edges lie farther apart than that.
    """
    places = torch.arange(512) / 64
    pad = torch.nn.functional.pad
    by_code = [torch.cat([levels(each), -levels(each)]) for each in _LEVELS]
    padded = [pad(edges(each), (0, 128 - len(edges(each))), value=torch.inf) for each in _LEVELS]
    up_to = [torch.bucketize(places, edges(each), right=True).to(torch.uint8) for each in _LEVELS]
    return torch.stack([pad(each, (0, 256 - len(each))) for each in by_code]), torch.stack(padded), torch.stack(up_to)
