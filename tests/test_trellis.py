"""The trellis of `allocated`: its levels, and that no other way through it errs less."""

import hashlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.codecs import kernels, trellis
from narrowcast.codecs.fitted import fitted

WIDTHS = range(1, 9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lloyd_max_levels(num_bits: int) -> Tensor:
    """Each level the mean of its cell, by Newton's method in FP64: Lloyd's iteration would take thousands of steps."""
    count = 2 ** (num_bits - 1)
    # The density of many levels goes with the cubic root of the normal one: normal, of variance 3.
    places = torch.arange(count, dtype=torch.float64) * 2 + 1
    levels = math.sqrt(6) * torch.erfinv(places / (2 * count))
    for _ in range(50):
        edges = torch.cat([torch.zeros(1), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])]).double()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        above = torch.tensor([math.erfc(edge / math.sqrt(2)) / 2 for edge in edges.tolist()], dtype=torch.float64)
        mass = above[:-1] - above[1:]
        means = (density[:-1] - density[1:]) / mass
        by_low = (density[:-1] * (means - edges[:-1]) / mass)[1:] / 2  # how a mean follows the edge below it
        by_high = (density[1:] * (edges[1:] - means) / mass)[:-1] / 2
        slope = torch.eye(count, dtype=torch.float64)
        slope[range(1, count), range(1, count)] -= by_low
        slope[range(1, count), range(count - 1)] -= by_low
        slope[range(count - 1), range(count - 1)] -= by_high
        slope[range(count - 1), range(1, count)] -= by_high
        levels = levels - torch.linalg.solve(slope, levels - means)
    assert (levels - means).abs().max() < 1e-9
    return levels


def test_levels_are_those_of_the_first_day() -> None:
    """Part of a byte format: no level is to change."""
    digest = hashlib.sha256(Path(trellis.__file__).with_suffix(".txt").read_bytes()).hexdigest()
    assert digest == "2e4b671d05e993c36cc3e0854780571cbb68bef3bddcfb07a1a2d2467dd2da24"


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_first_values_have_the_levels_of_lloyd_and_max(num_bits: int) -> None:
    levels = trellis.first_levels(num_bits)
    assert torch.equal(levels[::2], levels[1::2])
    derived = lloyd_max_levels(num_bits) * trellis.UNIT
    assert (levels[2**num_bits :: 2].double() * trellis.UNIT - derived).abs().max() <= 1


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_levels_are_symmetric_and_stand_where_what_is_coded_in_them_does(num_bits: int) -> None:
    """Twice as many as the bits tell apart; each near the mean of its values, by some hundred of which it is known."""
    levels = trellis.levels(num_bits)
    assert len(levels) == 2 ** (num_bits + 1)
    assert torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    q, widths = random(400, 64 * trellis.LANES, seed=num_bits), [num_bits] * 64
    decoded = trellis.decode(trellis.encode(q, widths), widths)[:, trellis.LANES :].contiguous()
    places = torch.searchsorted(levels, decoded.flatten())
    count = torch.bincount(places, minlength=len(levels))
    means = torch.bincount(places, weights=q[:, trellis.LANES :].flatten().double()) / count
    spread = 2.0**-num_bits * 4
    assert ((means - levels).abs() < 4 * spread / count.sqrt() + 0.1 * spread)[count > 100].all()


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_distortions_are_those_that_are_measured(num_bits: int) -> None:
    """Below Lloyd's and Max's (0.3634, 0.1175, 0.03454, 0.009497 for 1 to 4 bits), above what theory allows."""
    q, widths = random(200, 64 * trellis.LANES), [num_bits] * 64
    measured = (trellis.decode(trellis.encode(q, widths), widths) - q).double().square().mean().item()
    assert measured == pytest.approx(trellis.DISTORTION[num_bits], rel=0.02)
    assert 4.0**-num_bits < measured
    if num_bits <= 4:
        assert measured < (0.9 if num_bits == 1 else 0.78) * (0.3634, 0.1175, 0.03454, 0.009497)[num_bits - 1]


def all_ways(q: list[float], widths: list[int]) -> float:
    """The least weighted error of a sequence, over all bits of the path."""
    best = math.inf
    for path in itertools.product((0, 1), repeat=len(q)):
        bits, error = (0, 0, *path), 0.0
        for step, (value, width) in enumerate(zip(q, widths, strict=True)):
            levels = trellis.levels(width) if step else trellis.first_levels(width)
            subset = 2 * (bits[step + 2] ^ bits[step]) + bits[step + 1]
            error += 4.0**width * float((levels[subset::4] - value).square().min())
        best = min(best, error)
    return best


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    size=st.sampled_from([0.1, 1, 5]),
    seed=st.integers(0, 99),
)
def test_no_other_way_through_the_trellis_errs_less(widths: list[int], size: float, seed: int) -> None:
    """All lanes against all paths, of values small, ordinary and far beyond the outermost level."""
    q = size * random(1, len(widths) * trellis.LANES, seed=seed)
    codes = trellis.encode(q, widths)
    assert all((codes.int()[:, 16 * i : 16 * i + 16] < 2**width).all() for i, width in enumerate(widths))
    missed = (trellis.decode(codes, widths) - q).double().square().view(len(widths), trellis.LANES)
    weights = torch.tensor([4.0**width for width in widths]).double()
    for lane, found in enumerate((weights @ missed).tolist()):
        assert found == pytest.approx(all_ways(q[0, lane :: trellis.LANES].tolist(), widths), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(widths=st.lists(st.integers(1, 8), min_size=2, max_size=7), seed=st.integers(0, 99))
def test_what_comes_later_changes_nothing_that_was_decoded_before(widths: list[int], seed: int) -> None:
    """So that a guarded token may leave its last blocks out."""
    codes = trellis.encode(random(2, len(widths) * trellis.LANES, seed=seed), widths)
    whole = trellis.decode(codes, widths)
    assert torch.equal(trellis.decode(codes[:, : -trellis.LANES], widths[:-1]), whole[:, : -trellis.LANES])


def test_nothing_is_coded_as_nothing() -> None:
    assert trellis.encode(torch.empty(3, 0), []).shape == trellis.decode(torch.empty(3, 0).byte(), []).shape == (3, 0)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_values_beyond_all_numbers_are_coded_alike_by_all_kernels(num_bits: int) -> None:
    """Whose squares, or even ratios to the largest scale of a token, overflow."""
    codec = fitted(torch.full((1, 64), 1e-30), torch.full((1, 2), num_bits, dtype=torch.uint8))
    x_TE = torch.cat([random(2, 64) * size for size in (1e-30, 1e10, 1e37)])
    payloads = []
    for path in kernels.available():
        with kernels.forced(path):
            payloads.append(codec.encode(x_TE, source=0))
    assert all(torch.equal(each, payloads[0]) for each in payloads)
