"""The sites of a plan on one device: their codecs by hop, and the way that each sum takes."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import Hops, choose, named
from narrowcast.collectives.base import Sent
from narrowcast.collectives.clock import Span
from narrowcast.plan.chains import Chains
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.runtime.counters import Counters, SiteCounters
from narrowcast.runtime.feedback import common_unit
from narrowcast.runtime.reports import Report
from narrowcast.runtime.sampling import MAX_TOKENS, offset

Codecs = Mapping[str, Sequence[Codec]]

MAX_TRAFFICS = 1 << 14  # sizes of sums whose traffic is remembered


@functools.cache
def plain(dtype: torch.dtype) -> Hops:
    """The hops of values that travel as they are."""
    return Hops((CastCodec(dtype=dtype),) * 2)


class Sites:
    """The codecs of sites on one device, with counters. Where there are none, values travel in their own dtype.

    `algorithm`: that of coded sums; with "auto" the one that `decisions` name, or else the one of fewest bytes.
    `chains`: sites in the order of execution that leave what they lose to the next (`runtime.feedback`).
    `deterministic`: one choice for all sizes, the one that a single token takes, always coded where there are codecs.
    `timed`: count seconds beside bytes. `sample_every`: of so many calls of a coded site one is sampled, 0 for none;
    `sample_tokens`: the most of its tokens that are compared; `expected`: the relative errors of its sums by algorithm,
    beside which it is put. `kinds` of sites.
    """

    def __init__(
        self,
        codecs: Codecs,
        groups: Sequence[Sequence[int]],
        algorithm: str,
        device: torch.device,
        *,
        chains: Chains = Chains(),
        decisions: Decisions = Decisions(),
        deterministic: bool = False,
        timed: bool = False,
        kinds: Mapping[str, str] = MappingProxyType({}),
        expected: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
        sample_every: int = 0,
        sample_tokens: int = MAX_TOKENS,
    ) -> None:
        self.groups = tuple(tuple(group) for group in groups)
        self.chains = chains.among(codecs.keys())
        unit = common_unit({site: codecs[site] for chain in self.chains.chains for site in chain})
        self._coded = {name: Hops(tuple(hops), self.groups, unit) for name, hops in codecs.items()}
        self._algorithm, self.deterministic = algorithm, deterministic
        self.decisions = decisions if algorithm == "auto" and not deterministic else Decisions()
        self._algorithms: dict[tuple[str, str, int, int], str] = {}
        self._traffics: dict[tuple[str, Choice, int, int], Sent] = {}
        self._kinds, self._expected, self._every = kinds, expected, sample_every
        self.sample_tokens = sample_tokens
        self.timed, self._counters = timed, Counters(device, timed=timed)

    def hops(self, site: str, dtype: torch.dtype) -> Hops:
        """The codecs by hop for values of a dtype."""
        return self._coded.get(site) or plain(dtype)

    def counters(self, site: str, kind: str = "sum") -> SiteCounters:
        """The site's counters; `kind`, where the plan does not have it."""
        found = self._counters.sites.get(site)
        return self._new_counters(site, kind) if found is None else found

    def _new_counters(self, site: str, kind: str) -> SiteCounters:
        hops, stats = self._coded.get(site), torch.zeros(3, dtype=torch.int64, device=self._counters.device)
        counters = SiteCounters(hops is not None, stats, kind=self._kinds.get(site, kind))
        if hops is not None:
            counters.codecs, counters.every = hops.codecs, self._every
            counters.ahead = offset(len(self._counters.sites), self._every)
        return self._counters.add(site, counters)

    @property
    def samples(self) -> bool:
        """True where some sums are sampled."""
        return self._every > 0

    def expected_error(self, site: str, algorithm: str) -> float | None:
        """The relative RMS error of the site's sums by that algorithm, where the plan knows it."""
        return self._expected.get(site, {}).get(algorithm)

    def report(self) -> Report:
        """All that was counted so far."""
        return self._counters.report()

    def trace(self) -> list[Span]:
        """A list that takes every span of time from now on, if these are counted. Counts begin anew."""
        self.forget()
        self._counters.spans = []
        return self._counters.spans

    def forget(self) -> None:
        """Count from now on."""
        self._counters.clear()

    def choice(self, site: str, num_tokens: int, num_features: int, world_size: int) -> Choice:
        """The way that a sum of `num_features` takes."""
        form, algorithm = ("coded", self._algorithm) if site in self._coded else ("plain", "auto")
        decided = self.decisions.choice(num_tokens, num_features, coded=form == "coded")
        form, algorithm = decided or (form, algorithm)
        if form == "native":
            return Choice(form)
        few_tokens = 1 if self.deterministic else min(num_tokens, world_size)  # more do not change the algorithm
        key = site if form == "coded" else "", algorithm, few_tokens, num_features
        if key not in self._algorithms:
            hops = self._coded[site] if form == "coded" else plain(torch.float32)
            self._algorithms[key] = choose(algorithm, hops, few_tokens, num_features, world_size)
        return Choice(form, self._algorithms[key])

    def traffic(
        self, site: str, choice: Choice, shape: tuple[int, int], dtype: torch.dtype, rank: int, world_size: int
    ) -> Sent:
        """The traffic of `rank` for a sum of `shape`, tokens and features, that takes that way."""
        key = site, choice, *shape
        traffic = self._traffics.get(key)
        if traffic is None:
            hops = self.hops(site, dtype) if choice.form == "coded" else plain(dtype)
            traffic = traffic_of(choice, hops, shape, rank, world_size)
            if len(self._traffics) < MAX_TRAFFICS:
                self._traffics[key] = traffic
        return traffic


def traffic_of(choice: Choice, hops: Hops, shape: tuple[int, int], rank: int, world_size: int) -> Sent:
    """The traffic of `rank` for a sum of `shape`; a native one counts as the optimum, 2 (R - 1) / R of the values."""
    num_tokens, num_features = shape
    if choice.form == "native":
        num_values = 2 * (world_size - 1) * num_tokens * num_features // world_size
        return Sent.once(hops.codecs[0].row_nbytes(1) * num_values, num_values)
    traffic = named(choice.algorithm).sent(hops, num_tokens, num_features, rank, world_size)
    assert traffic is not None, "only algorithms that can run are chosen"
    return traffic
