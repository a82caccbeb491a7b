"""Counters of what travels: bytes that were sent, values they stand for, values that were clipped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from narrowcast import ops
from narrowcast.collectives.base import Traffic

Kind = Literal["coded", "uncompressed"]


@dataclass
class SiteCounters:
    """One site on one rank, since `attach`."""

    kind: Kind
    stats: Tensor  # int64 [2], see ops: saturated, non-finite
    num_tokens: int = 0
    wire_bytes: int = 0
    num_values: int = 0

    def count_sent(self, traffic: Traffic) -> None:
        """Add what was handed to the transport."""
        self.wire_bytes += traffic.nbytes
        self.num_values += traffic.num_values


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank has sent. Sites that travel uncompressed (embedding, logits) are kept apart.

    `bits_per_value`: bits of coded payloads over the values in them; None before anything was sent.
    `wire_bytes_per_token`: coded payload bytes that this rank sent, over the tokens it processed.
    `uncompressed_bytes_per_token`: the same for each site that is not coded.
    `num_saturated`, `num_non_finite`: coded values that were clipped, or NaN or infinite (simulated: of all ranks).
    """

    num_tokens: int
    bits_per_value: float | None
    wire_bytes_per_token: float
    uncompressed_bytes_per_token: Mapping[str, float]
    num_saturated: int
    num_non_finite: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**self.__dict__, "uncompressed_bytes_per_token": dict(self.uncompressed_bytes_per_token)}


@dataclass
class Monitor:
    """Counters by site. Saturation is counted on the tensors' device and read only in `report`."""

    device: torch.device
    sites: dict[str, SiteCounters] = field(default_factory=dict)

    def site(self, name: str, kind: Kind) -> SiteCounters:
        """The counters of a site, made at first use."""
        if name not in self.sites:
            self.sites[name] = SiteCounters(kind, torch.zeros(2, dtype=torch.int64, device=self.device))
        return self.sites[name]

    def report(self) -> Report:
        """The sums over sites."""
        coded = [site for site in self.sites.values() if site.kind == "coded"]
        num_tokens = max((site.num_tokens for site in coded), default=0)
        wire_bytes, num_values = sum(site.wire_bytes for site in coded), sum(site.num_values for site in coded)
        stats = sum((site.stats for site in coded), torch.zeros(2, dtype=torch.int64, device=self.device))
        return Report(
            num_tokens=num_tokens,
            bits_per_value=8 * wire_bytes / num_values if num_values else None,
            wire_bytes_per_token=wire_bytes / max(num_tokens, 1),
            uncompressed_bytes_per_token={
                name: site.wire_bytes / max(num_tokens, 1)
                for name, site in self.sites.items()
                if site.kind == "uncompressed"
            },
            num_saturated=int(stats[ops.SATURATED]),
            num_non_finite=int(stats[ops.NON_FINITE]),
        )
