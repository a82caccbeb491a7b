"""Means with intervals: of a figure over sequences, or over the questions of a task, and of what changed in it.

Tokens of a sequence depend on each other, so that items are whole sequences. Student's t is for as few as there are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """The ends between which a mean lies, with 95 % confidence."""

    low: float
    high: float


def written(interval: Interval | None, form: str) -> str:
    """The interval as users read it, each end in this `form`; nothing where there is none."""
    return "" if interval is None else f"{form.format(interval.low)} to {form.format(interval.high)}"


@dataclass(frozen=True, kw_only=True)
class Items:
    """A figure by item: `values` for each, and as `weights` how many tokens (or questions) each is the mean of.

    >>> kl = Items(values=(0.1, 0.2, 0.3), weights=(10, 10, 10))
    >>> f"{kl.mean:.3f} in {kl.interval().low:.3f} to {kl.interval().high:.3f}"
    '0.200 in -0.048 to 0.448'
    """

    values: tuple[float, ...]
    weights: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Over tokens: items count by their weight."""
        return math.fsum(value * weight for value, weight in self._pairs) / sum(self.weights)

    @property
    def standard_error(self) -> float:
        """Of the mean; infinite for a single item. Where weights differ, that of a ratio of two sums."""
        number = len(self.values)
        if number < 2:
            return math.inf
        mean, share = self.mean, sum(self.weights) / number
        squares = ((weight * (value - mean) / share) ** 2 for value, weight in self._pairs)
        return math.sqrt(math.fsum(squares) / (number - 1) / number)

    def interval(self) -> Interval | None:
        """The 95 % confidence interval around the mean; None for a single item, which says nothing of the next one."""
        if len(self.values) < 2:
            return None
        reach = t_quantile(CONFIDENCE, len(self.values) - 1) * self.standard_error
        return Interval(self.mean - reach, self.mean + reach)

    def p_above_zero(self) -> float:
        """The probability of a mean this large, or larger, where the true one is not above zero."""
        mean, error = self.mean, self.standard_error
        if len(self.values) < 2 or error == 0:  # a change that is the same everywhere is no accident
            return 1.0 if len(self.values) < 2 or mean <= 0 else 0.0
        within = t_within(abs(mean) / error, len(self.values) - 1)
        return (1 - within) / 2 if mean > 0 else (1 + within) / 2

    def __sub__(self, other: "Items") -> "Items":
        """The difference from `other`, item by item of the same text."""
        assert self.weights == other.weights, "pairs of the same items"
        values = (mine - theirs for mine, theirs in zip(self.values, other.values, strict=True))
        return Items(values=tuple(values), weights=self.weights)

    def __neg__(self) -> "Items":
        return Items(values=tuple(-value for value in self.values), weights=self.weights)

    @property
    def _pairs(self) -> Iterator[tuple[float, int]]:
        return zip(self.values, self.weights, strict=True)

    @classmethod
    def from_json(cls, figures: Mapping[str, Any]) -> Self:
        """Items from the JSON values of both fields; KeyError, TypeError or ValueError for anything else."""
        values, weights = tuple(map(float, figures["values"])), tuple(map(int, figures["weights"]))
        if len(values) != len(weights) or not values or min(weights) < 1 or not all(map(math.isfinite, values)):
            raise ValueError("no finite value with its weight for each item")
        return cls(values=values, weights=weights)


def t_within(t: float, degrees: int) -> float:
    """The probability that Student's t of whole `degrees` of freedom is within -t to t (Abramowitz and Stegun).

    The finite sums 26.7.3 and 26.7.4; exact but for rounding.
    """
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    cosine = math.cos(angle)
    terms = [cosine if odd else 1.0]
    for place in range(1, degrees // 2):
        terms.append(terms[-1] * cosine**2 * (2 * place - 1 + odd) / (2 * place + odd))
    total = math.sin(angle) * math.fsum(terms[: degrees // 2])
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(confidence: float, degrees: int) -> float:
    """The t within which Student's t lies with `confidence`."""
    low, high = 0.0, 1.0
    while t_within(high, degrees) < confidence:
        high *= 2
    for _ in range(60):  # halves what is left, down to rounding
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < confidence else (low, middle)
    return high


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's p-values: below a level with at most that probability for any of the figures that has not changed.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted, largest = dict(p_values), 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
