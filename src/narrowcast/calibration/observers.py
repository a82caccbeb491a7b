"""Observers: what calibration remembers of a site, averaged ranges by hop and the error that finished codecs make."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from narrowcast.codecs import Ranges
from narrowcast.collectives import simulate
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Site
from narrowcast.runtime.sampling import Samples, ordinary

EMA_FACTOR = 0.01  # weight of each new sequence (gamma in peers' words; the first sequence initialises)

# How the first tokens of a sequence count, which can be many times larger than all others: "count" as every
# token does (the paper), for "choosing" the outliers but not for scales, or "skip" for both.
# The default was measured: docs/calibration.md.
FirstTokens = Literal["count", "choosing", "skip"]


Groups = Sequence[Sequence[int]]


class PowerObserver:
    """Squares of each token's values at every site, without the first `num_left_out` of a sequence."""

    def __init__(self, num_left_out: int = 0) -> None:
        self._num_left_out = num_left_out
        self._power: dict[str, list[Tensor]] = {}

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        """Look at a sum."""
        self.see(total, site)

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Look at all features."""
        self.see(torch.cat(list(parts), dim=-1), site)

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Look at values. Of tokens that are in no order, all count."""
        power_T = _power(_flat(x))
        self._power.setdefault(site, []).append(
            power_T[first_counted(self._num_left_out if ordered else 0, len(power_T)) :]
        )

    def ruled_by_few(self) -> list[str]:
        """Sites at which tokens that are not ordinary hold more than half of the power."""
        powers = {site: torch.cat(powers) for site, powers in self._power.items()}
        return [site for site, power_T in powers.items() if power_T[ordinary(power_T)].sum() < power_T.sum() / 2]


class RangeObserver:
    """Moving averages of the ranges of every site: for what the ranks put in [R, E], for sums [1, E], and, where
    there are `groups`, for the sums of these nodes [N, E].
    """

    def __init__(self, first_tokens: FirstTokens, num_first: int, groups: Groups = ()) -> None:
        self._groups = groups
        self._first_choosing = num_first if first_tokens == "skip" else 0  # tokens left out in choosing outliers
        self._first_scale = 0 if first_tokens == "count" else num_first  # tokens left out in scales
        self._extremes: dict[str, list[Tensor]] = {}

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        """Look at partial sums, their sum, and the sums of nodes."""
        hops = [torch.stack([_flat(x) for x in partials]), _flat(total)[None]]
        if self._groups:
            sums = [exact_sum([_flat(partials[rank]).float() for rank in group]) for group in self._groups]
            hops.append(torch.stack(sums))
        self._see(site, hops)

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Look at all features as the values of one source."""
        self.see(torch.cat(list(parts), dim=-1), site)

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Look at the values of one source. Of tokens that are in no order, all count."""
        if len(x):
            self._see(site, [_flat(x)[None]], left_out=None if ordered else (0, 0))

    def _see(self, site: str, hops: Sequence[Tensor], left_out: tuple[int, int] | None = None) -> None:
        left_out = left_out or (self._first_choosing, self._first_scale)
        seen = [torch.cat([_extremes(x_RTE, num) for num in left_out]) for x_RTE in hops]
        if old := self._extremes.get(site):
            seen = [before + EMA_FACTOR * (new - before) for before, new in zip(old, seen, strict=True)]
        self._extremes[site] = seen

    def ranges(self, sites: Iterable[str]) -> dict[str, list[Ranges]]:
        """Ranges by site and hop; InvalidInputError if a site gave values that are not finite, or none."""
        if missing := set(sites) - self._extremes.keys():
            raise InvalidInputError(
                min(missing),
                expected="values from the calibration text",
                found="none",
                remedy="Pass more text; parts of a model that no text reaches, as of images, are not supported.",
            )
        return {site: [_ranges(site, hop) for hop in self._extremes[site]] for site in sites}


class ErrorObserver:
    """Relative RMS error of the codecs of what travels once as it is, of tokens that count where sums are sampled."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._codecs = {name: site.codecs[0] for name, site in sites.items()}
        self.samples: dict[str, Samples] = {}

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        """Sums are sampled where they are coded."""

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Compare columns that were coded rank by rank with what they were."""
        if site in self._codecs:
            flat = [_flat(x) for x in parts]
            self._count(site, torch.cat(flat, dim=-1), simulate.all_gather_features(flat, codec=self._codecs[site]))

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Compare what was coded once with what it was."""
        if site in self._codecs:
            flat = _flat(x)
            self._count(site, flat, simulate.send(flat, src=0, world_size=1, codec=self._codecs[site]))

    def _count(self, site: str, exact: Tensor, coded: Tensor) -> None:
        self.samples.setdefault(site, Samples()).compare(coded.float()[None], exact.float())


def exact_sum(partials: Sequence[Tensor]) -> Tensor:
    """The sum in fp32, in rank order, rounded once."""
    total = partials[0].float()
    for x in partials[1:]:
        total = total + x.float()
    return total.to(partials[0].dtype)


def _power(x_TE: Tensor) -> Tensor:
    """Of each token [T]."""
    return x_TE.double().square().sum(dim=1).cpu()


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def first_counted(num_left_out: int, num_tokens: int) -> int:
    """The place from which on tokens of a sequence count: a short one counts with its last token."""
    return max(0, min(num_left_out, num_tokens - 1))


def _extremes(x_RTE: Tensor, num_left_out: int) -> Tensor:
    """Smallest and largest over tokens, in fp32, stacked: [2, R, E]."""
    counted = x_RTE[:, first_counted(num_left_out, x_RTE.shape[1]) :]
    return torch.stack([counted.amin(dim=1), counted.amax(dim=1)]).float()


def _ranges(site: str, extremes: Tensor) -> Ranges:
    if not extremes.isfinite().all():
        raise InvalidInputError(
            site,
            expected="finite values",
            found="inf or nan",
            remedy="Calibrate on other text, or load the model in bf16 rather than fp16.",
        )
    return Ranges(**dict(zip(("low", "high", "scale_low", "scale_high"), extremes, strict=True)))
