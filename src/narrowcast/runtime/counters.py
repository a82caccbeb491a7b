"""Counters by site: calls by the way that they took, bytes by hop, values that were clipped, seconds if asked for."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.base import Hops, Sent, Traffic
from narrowcast.collectives.clock import Clock, Span
from narrowcast.plan.summary import codec_name
from narrowcast.runtime.reports import COUNTS, Passed, Report, SiteReport, Way
from narrowcast.runtime.sampling import Distributions, Samples
from narrowcast.transport import Transport


class _Tally:
    """Running sums of what passed one way."""

    def __init__(self) -> None:
        self.times, self.plain_bytes = 0, 0
        self.by_hop: list[list[int]] = []

    def add(self, sent: Sent, itemsize: int) -> None:
        self.times += 1
        while len(self.by_hop) < len(sent.by_hop):
            self.by_hop.append([0, 0])
        for mine, (nbytes, num_values) in zip(self.by_hop, sent.by_hop, strict=False):
            mine[0] += nbytes
            mine[1] += num_values
            self.plain_bytes += num_values * itemsize


@dataclass
class SiteCounters:
    """One site on one rank, since `attach`: `kind` as the plan has it, or what it does; its `codecs` by hop.

    One of `every` calls is to be sampled, none if that is 0; `ahead`: by so many calls earlier than the first site's.
    """

    coded: bool
    stats: Tensor  # int64 [3], by the places of COUNTS
    kind: str = ""
    codecs: Sequence[Codec] = ()
    clock: Clock | None = None
    every: int = 0
    ahead: int = 0
    num_calls: int = 0
    num_tokens: int = 0
    samples: Samples = field(default_factory=Samples)
    distributions: Distributions = field(default_factory=Distributions)  # of all sites of its kind
    _ways: dict[Way, _Tally] = field(default_factory=dict)

    @property
    def due(self) -> bool:
        """True if the next call is to be sampled: on all ranks alike, as all make the same calls."""
        return self.every > 0 and (self.num_calls + 1 + self.ahead) % self.every == 0

    def hops(self, hops: Hops) -> Hops:
        """The codecs of a sum, counting their time if asked for."""
        return hops if self.clock is None else self.clock.hops(hops)

    def codec(self, codec: Codec) -> Codec:
        """The codec, counting its time if asked for."""
        return codec if self.clock is None else self.clock.codec(codec)

    def transport(self, transport: Transport) -> Transport:
        """The transport, counting its time if asked for."""
        return transport if self.clock is None else self.clock.transport(transport)

    def count(self, num_tokens: int, way: Way, sent: Sent, itemsize: int) -> None:
        """Add a call: tokens, and what was sent for them that way, values of `itemsize` bytes each, coded or not."""
        self.num_calls += 1
        self.num_tokens += num_tokens
        tally = self._ways.get(way)
        if tally is None:
            tally = self._ways[way] = _Tally()
        tally.add(sent, itemsize)

    def report(self) -> "SiteReport":
        """All of it, read from the device."""
        stats = self.stats.tolist()
        passed = [
            Passed(
                way=way,
                times=tally.times,
                by_hop=tuple(Traffic(*hop) for hop in tally.by_hop),
                plain_bytes=tally.plain_bytes,
            )
            for way, tally in list(self._ways.items())
        ]
        return SiteReport(
            coded=self.coded,
            kind=self.kind,
            codecs=tuple(codec_name(codec) for codec in self.codecs),
            num_tokens=self.num_tokens,
            wire_bytes=sum(hop.nbytes for each in passed for hop in each.by_hop),
            plain_bytes=sum(each.plain_bytes for each in passed),
            num_values=sum(hop.num_values for each in passed for hop in each.by_hop),
            **{name: stats[place] for name, place in COUNTS.items()},
            seconds={} if self.clock is None else self.clock.to_json(),
            passed=tuple(passed),
            samples=replace(self.samples) if self.every else None,
        )


@dataclass
class Counters:
    """All counters by site. Saturation is counted on the tensors' device and read only in `report`."""

    device: torch.device
    timed: bool = False
    spans: list[Span] | None = None
    sites: dict[str, SiteCounters] = field(default_factory=dict)
    distributions: dict[str, Distributions] = field(default_factory=dict)  # by kind of sites that are sampled

    def add(self, name: str, counters: SiteCounters) -> SiteCounters:
        """The counters of a site from now on."""
        if counters.every:
            counters.distributions = self.distributions.setdefault(counters.kind, counters.distributions)
        if self.timed:
            counters.clock = Clock(name, self.spans)
        self.sites[name] = counters
        return counters

    def report(self) -> Report:
        """The figures of all sites."""
        sites = {name: site.report() for name, site in list(self.sites.items())}
        distributions = {kind: deepcopy(each) for kind, each in list(self.distributions.items())}
        return Report(sites=sites, distributions=distributions)

    def clear(self) -> None:
        """Count from now on."""
        self.sites.clear()
        self.distributions.clear()
