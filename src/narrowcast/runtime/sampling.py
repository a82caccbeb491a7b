"""Sampled sums: every so many calls of a site, what its coding loses is measured against the exact sum of a few tokens.

What the ranks put in, earlier losses included, is also summed exactly. That costs another exchange, and the sum is then
made by steps, whose time is taken; so few sums are sampled, and not those of all sites at once.

Shapes: T tokens, of which N are sampled, E features, R ranks that compute here.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrowcast.collectives.clock import PARTS
from narrowcast.errors import InvalidInputError

EVERY = 1000  # calls of a site, of which one is sampled: that costs less than a hundredth (docs/monitoring.md)
# Times the median power of a site's tokens: those beyond are few, and would hide what becomes of all others.
ORDINARY = 16.0
MAX_TOKENS = 16  # of a sum that are compared
_STAGGERED = (5**0.5 - 1) / 2  # so that no two sites of a few hundred are due together

# Upper bounds of histograms: relative errors over the plan's; the size of what is fed back over the stream's; seconds.
RATIOS = 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0
SHARES = 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0
SECONDS = 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0


@dataclass
class Histogram:
    """Numbers counted by the first of `bounds` that they do not exceed; those above all, last."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, number: float) -> None:
        """Count one more; one that is not finite lies above all bounds, and is left out of the total."""
        finite = math.isfinite(number)
        self.counts[bisect_left(self.bounds, number) if finite else -1] += 1
        self.total += number if finite else 0.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Histogram":
        """The histogram of which these are the fields."""
        return cls(tuple(values["bounds"]), list(values["counts"]), values["total"])


@dataclass
class Samples:
    """The sampled sums of one site, on one rank, and what they told.

    `noise`, `power`: squares of the errors and of the exact sums, over all ordinary tokens of them. `expected_noise`:
    the squares that the plan expects of these errors, 0 where it knows none.
    """

    times: int = 0
    num_non_finite: int = 0
    noise: float = 0.0
    power: float = 0.0
    expected_noise: float = 0.0
    last: float = 0.0

    def compare(self, seen_RNE: Tensor, exact_NE: Tensor, expected: float | None = None) -> float | None:
        """Count a sum that ranks see as `seen_RNE`, and that exactly is `exact_NE`, both in FP32.

        `expected`: the relative RMS error that the plan has for the algorithm which made it, if it has one; its own
        over that is the result.
        """
        noise_N = _power(seen_RNE - exact_NE).mean(dim=0)
        power_N = _power(exact_NE)
        counted_N = ordinary(power_N)
        noise, power = noise_N[counted_N].sum().item(), power_N[counted_N].sum().item()
        self.times += 1
        if not math.isfinite(noise) or not math.isfinite(power):
            self.num_non_finite += 1
            return None
        self.noise, self.power = self.noise + noise, self.power + power
        self.last = math.sqrt(noise / power) if power else 0.0
        if not expected:
            return None
        self.expected_noise += expected**2 * power
        return self.last / expected

    @property
    def error(self) -> float | None:
        """The relative RMS error of all that was sampled; None before anything was."""
        return math.sqrt(self.noise / self.power) if self.power else None

    @property
    def expected(self) -> float | None:
        """The one that the plan expects, of sums by several algorithms, say; None where it expects none."""
        return math.sqrt(self.expected_noise / self.power) if self.expected_noise else None

    def __add__(self, other: "Samples") -> "Samples":
        """Those of two ranks, or of two sites."""
        return Samples(
            times=self.times + other.times,
            num_non_finite=self.num_non_finite + other.num_non_finite,
            noise=self.noise + other.noise,
            power=self.power + other.power,
            expected_noise=self.expected_noise + other.expected_noise,
            last=max(self.last, other.last),
        )


@dataclass
class Distributions:
    """The sampled sums of all sites of one kind, on one rank.

    `ratios`: their errors over the plan's. `residues`: RMS of what is fed back over that of the residual stream, which
    it is added to. `seconds`: of a sum by part, on the host.
    """

    ratios: Histogram = field(default_factory=lambda: Histogram(RATIOS))
    residues: Histogram = field(default_factory=lambda: Histogram(SHARES))
    seconds: dict[str, Histogram] = field(default_factory=lambda: {part: Histogram(SECONDS) for part in PARTS})

    def add(self, ratio: float | None, seconds: Mapping[str, float]) -> None:
        """Count a sum: its error over the plan's, if that is known, and its seconds by part."""
        if ratio is not None:
            self.ratios.add(ratio)
        for part, passed_s in seconds.items():
            self.seconds[part].add(passed_s)

    def see_stream(self, residue_TE: Tensor, scale: float, stream_TE: Tensor) -> None:
        """Count what is fed back, `scale` times the residue, beside the stream that it will be added to."""
        share_T = _power(residue_TE * scale) / _power(stream_TE).clamp_min(1e-30)
        self.residues.add(share_T.mean().sqrt().item())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Distributions":
        """Those of which these are the fields, as JSON values."""
        seconds = {part: Histogram.of(each) for part, each in values["seconds"].items()}
        return cls(Histogram.of(values["ratios"]), Histogram.of(values["residues"]), seconds)


def check_sampling(where: str, every: int) -> None:
    """InvalidInputError unless so many calls of a site can be the ones of which one is sampled."""
    if type(every) is not int or every < 0:
        expected = "calls of a site, of which one is sampled, or 0 for none"
        raise InvalidInputError(where, expected=expected, found=every, remedy=f"Try {EVERY}.")


def offset(index: int, every: int) -> int:
    """The calls by which the site of that number is ahead of the first one."""
    return int(index * _STAGGERED % 1 * every)


def sampled(num_tokens: int, most: int = MAX_TOKENS) -> Tensor:
    """The places of the tokens to compare, `most` of them, spread evenly."""
    return torch.linspace(0, num_tokens - 1, min(num_tokens, most)).round().long()


def ordinary(power_T: Tensor) -> Tensor:
    """True for tokens of no more than 16 times the median power [T], or for all of them where most have none."""
    most = ORDINARY * power_T.median()
    return power_T <= most if most > 0 else torch.ones_like(power_T, dtype=torch.bool)


def _power(x: Tensor) -> Tensor:
    """Of each token, [...] of [..., E]."""
    return x.double().square().sum(dim=-1).cpu()
