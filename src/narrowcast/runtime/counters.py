"""Counters by site: bytes that were sent, values they stand for, values that were clipped, and seconds if asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast.aligned import aligned
from narrowcast.codecs import Codec
from narrowcast.codecs.base import GUARDED, NON_FINITE, SATURATED
from narrowcast.collectives.base import Hops, Traffic
from narrowcast.collectives.clock import Clock, Span
from narrowcast.plan.summary import short_name
from narrowcast.transport import Transport

# Figures, and their places in stats.
COUNTS = {"num_saturated": SATURATED, "num_non_finite": NON_FINITE, "num_guarded": GUARDED}


@dataclass
class SiteCounters:
    """One site on one rank, since `attach`."""

    coded: bool
    stats: Tensor  # int64 [3], see ops
    num_tokens: int = 0
    wire_bytes: int = 0
    num_values: int = 0
    plain_bytes: int = 0
    clock: Clock | None = None

    def hops(self, hops: Hops) -> Hops:
        """The codecs of a sum, counting their time if asked for."""
        return hops if self.clock is None else self.clock.hops(hops)

    def codec(self, codec: Codec) -> Codec:
        """The codec, counting its time if asked for."""
        return codec if self.clock is None else self.clock.codec(codec)

    def transport(self, transport: Transport) -> Transport:
        """The transport, counting its time if asked for."""
        return transport if self.clock is None else self.clock.transport(transport)

    def count(self, num_tokens: int, traffic: Traffic, itemsize: int) -> None:
        """Add tokens that were processed, and what was sent for them: values of `itemsize` bytes each, coded or not."""
        self.num_tokens += num_tokens
        self.wire_bytes += traffic.nbytes
        self.num_values += traffic.num_values
        self.plain_bytes += traffic.num_values * itemsize

    def report(self) -> "SiteReport":
        """All of it, read from the device."""
        stats = self.stats.tolist()
        return SiteReport(
            coded=self.coded,
            num_tokens=self.num_tokens,
            wire_bytes=self.wire_bytes,
            plain_bytes=self.plain_bytes,
            num_values=self.num_values,
            **{name: stats[place] for name, place in COUNTS.items()},
            seconds={} if self.clock is None else self.clock.to_json(),
        )


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The figures of one rank at one site. `coded`: the plan has a codec for it.

    `plain_bytes`: what the same values take in the model's own dtype, sent by the same algorithm.
    `num_saturated`, `num_non_finite`: values that were clipped, or NaN or infinite; `num_guarded`: tokens that were
    coded in a safe form (simulated: of all ranks). `seconds`: where time went (`Clock`), empty unless asked for.
    """

    coded: bool
    num_tokens: int
    wire_bytes: int
    plain_bytes: int
    num_values: int
    num_saturated: int = 0
    num_non_finite: int = 0
    num_guarded: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits_per_value(self) -> float | None:
        """Bits that a value took; None before anything was sent."""
        return 8 * self.wire_bytes / self.num_values if self.num_values else None

    def __add__(self, other: "SiteReport") -> "SiteReport":
        """The figures of two ranks at the same site for the same tokens."""
        return SiteReport(
            coded=self.coded,
            num_tokens=max(self.num_tokens, other.num_tokens),
            wire_bytes=self.wire_bytes + other.wire_bytes,
            plain_bytes=self.plain_bytes + other.plain_bytes,
            num_values=self.num_values + other.num_values,
        ).counting([self, other])

    def counting(self, ranks: Sequence["SiteReport"]) -> "SiteReport":
        """This report with what was clipped, or not finite, on all of `ranks`."""
        return replace(self, **{name: sum(getattr(rank, name) for rank in ranks) for name in COUNTS})


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """The figures of one rank, or, simulated, of the first rank of every pipeline stage; sites not coded kept apart.

    Printed, it is a table.
    `prompts`: long prompts by how they ran, in turns or why not, where they were to.
    """

    sites: Mapping[str, SiteReport]
    prompts: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        bits = "nothing sent" if self.bits_per_value is None else f"{self.bits_per_value:.4g} bits a value"
        sent = f"{bits}, {self.wire_bytes_per_token:.0f} bytes a token"
        return f"Report({len(self.sites)} sites, {self.num_tokens} tokens, {sent})"

    def __str__(self) -> str:
        rows = [("site", "bits a value", "bytes a token", "clipped", "not finite", "guarded")]
        for name, site in self.sites.items():
            bits = "not coded" if not site.coded else f"{site.bits_per_value or 0:.4f}"
            nbytes = f"{site.wire_bytes / max(site.num_tokens, 1):.0f}"
            counts = str(site.num_saturated), str(site.num_non_finite), str(site.num_guarded)
            rows.append((short_name(name), bits, nbytes, *counts))
        return f"{self!r}\n\n{aligned(rows)}"

    @property
    def num_saturated(self) -> int:
        """Coded values that were clipped (simulated: on all ranks)."""
        return sum(site.num_saturated for site in self._coded)

    @property
    def num_non_finite(self) -> int:
        """Coded values that were NaN or infinite (simulated: on all ranks)."""
        return sum(site.num_non_finite for site in self._coded)

    @property
    def num_guarded(self) -> int:
        """Tokens, site by site, so far out of the calibrated range that they were coded in a safe form (the same)."""
        return sum(site.num_guarded for site in self._coded)

    @property
    def num_tokens(self) -> int:
        """Tokens that were processed."""
        return max((site.num_tokens for site in self.sites.values()), default=0)

    @property
    def bits_per_value(self) -> float | None:
        """Bits of coded payloads over the values in them; None before anything was sent."""
        num_values = sum(site.num_values for site in self._coded)
        return 8 * sum(site.wire_bytes for site in self._coded) / num_values if num_values else None

    @property
    def wire_bytes_per_token(self) -> float:
        """Coded payload bytes that were sent, over the tokens."""
        return sum(site.wire_bytes for site in self._coded) / max(self.num_tokens, 1)

    @property
    def uncompressed_bytes_per_token(self) -> dict[str, float]:
        """The same for each site that is not coded."""
        plain = {name: site for name, site in self.sites.items() if not site.coded}
        return {name: site.wire_bytes / max(self.num_tokens, 1) for name, site in plain.items()}

    @property
    def _coded(self) -> list[SiteReport]:
        return [site for site in self.sites.values() if site.coded]

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        figures = "num_tokens", "bits_per_value", "wire_bytes_per_token", "uncompressed_bytes_per_token", *COUNTS
        return {figure: getattr(self, figure) for figure in figures} | asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Report":
        """The report that `to_json` gave."""
        sites = {name: SiteReport(**site) for name, site in values["sites"].items()}
        return cls(sites=sites, prompts=values["prompts"])


@dataclass
class Counters:
    """All counters by site. Saturation is counted on the tensors' device and read only in `report`."""

    device: torch.device
    timed: bool = False
    spans: list[Span] | None = None
    sites: dict[str, SiteCounters] = field(default_factory=dict)

    def site(self, name: str, *, coded: bool) -> SiteCounters:
        """The counters of a site, made at first use."""
        if name not in self.sites:
            stats = torch.zeros(3, dtype=torch.int64, device=self.device)
            self.sites[name] = SiteCounters(coded, stats, clock=Clock(name, self.spans) if self.timed else None)
        return self.sites[name]

    def report(self) -> Report:
        """The figures of all sites."""
        return Report(sites={name: site.report() for name, site in self.sites.items()})
