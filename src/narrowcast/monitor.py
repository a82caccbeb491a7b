"""Counters of what travels, site by site: bytes that were sent, values they stand for, values that were clipped."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrowcast import ops
from narrowcast.collectives.base import Traffic


@dataclass
class SiteCounters:
    """One site on one rank, since `attach`."""

    coded: bool
    stats: Tensor  # int64 [2], see ops: saturated, non-finite
    num_tokens: int = 0
    wire_bytes: int = 0
    num_values: int = 0
    plain_bytes: int = 0

    def count_sent(self, traffic: Traffic, itemsize: int) -> None:
        """Add what was handed to the transport: values of `itemsize` bytes each, coded or not."""
        self.wire_bytes += traffic.nbytes
        self.num_values += traffic.num_values
        self.plain_bytes += traffic.num_values * itemsize


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """What one rank has sent at one site. `coded`: whether the plan has a codec for it.

    `plain_bytes`: what the same values take in the model's own dtype, sent by the same algorithm.
    """

    coded: bool
    num_tokens: int
    wire_bytes: int
    plain_bytes: int
    bits_per_value: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank has sent. Sites that travel uncompressed (embedding, logits) are kept apart.

    `num_tokens`: tokens that this rank has processed.
    `bits_per_value`: bits of coded payloads over the values in them; None before anything was sent.
    `wire_bytes_per_token`: coded payload bytes that this rank sent, over the tokens it processed.
    `uncompressed_bytes_per_token`: the same for each site that is not coded.
    `num_saturated`, `num_non_finite`: coded values that were clipped, or NaN or infinite (simulated: of all ranks).
    `sites`: each site by itself.
    """

    num_tokens: int
    bits_per_value: float | None
    wire_bytes_per_token: float
    uncompressed_bytes_per_token: Mapping[str, float]
    num_saturated: int
    num_non_finite: int
    sites: Mapping[str, SiteReport]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass
class Monitor:
    """Counters by site. Saturation is counted on the tensors' device and read only in `report`."""

    device: torch.device
    sites: dict[str, SiteCounters] = field(default_factory=dict)

    def site(self, name: str, *, coded: bool) -> SiteCounters:
        """The counters of a site, made at first use."""
        if name not in self.sites:
            self.sites[name] = SiteCounters(coded, torch.zeros(2, dtype=torch.int64, device=self.device))
        return self.sites[name]

    def report(self) -> Report:
        """The sums over sites."""
        coded = [site for site in self.sites.values() if site.coded]
        num_tokens = max((site.num_tokens for site in self.sites.values()), default=0)
        wire_bytes, num_values = sum(site.wire_bytes for site in coded), sum(site.num_values for site in coded)
        stats = sum((site.stats for site in coded), torch.zeros(2, dtype=torch.int64, device=self.device))
        return Report(
            num_tokens=num_tokens,
            bits_per_value=_bits(wire_bytes, num_values),
            wire_bytes_per_token=wire_bytes / max(num_tokens, 1),
            uncompressed_bytes_per_token={
                name: site.wire_bytes / max(num_tokens, 1) for name, site in self.sites.items() if not site.coded
            },
            num_saturated=int(stats[ops.SATURATED]),
            num_non_finite=int(stats[ops.NON_FINITE]),
            sites={
                name: SiteReport(
                    coded=site.coded,
                    num_tokens=site.num_tokens,
                    wire_bytes=site.wire_bytes,
                    plain_bytes=site.plain_bytes,
                    bits_per_value=_bits(site.wire_bytes, site.num_values),
                )
                for name, site in self.sites.items()
            },
        )


def _bits(nbytes: int, num_values: int) -> float | None:
    return 8 * nbytes / num_values if num_values else None
