"""Reports: the figures of a rank, by site and by the way that values took there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from narrowcast.aligned import aligned
from narrowcast.codecs.base import GUARDED, NON_FINITE, SATURATED
from narrowcast.collectives.base import Traffic
from narrowcast.plan.summary import short_name
from narrowcast.runtime.sampling import Distributions, Samples

# Figures, and their places in stats.
COUNTS = {"num_saturated": SATURATED, "num_non_finite": NON_FINITE, "num_guarded": GUARDED}


ONCE = "once"  # in place of an algorithm, where nothing is added up


class Way(NamedTuple):
    """The way that values took: `form` and `algorithm` as of a `Choice`, and what ran it.

    `path`: "layer", with a layer that was recorded; "call", a sum that was, in one native call; "steps", of Python;
    "native", the group's own.
    """

    form: str
    algorithm: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Calls of a site that took one way: how many, their traffic by hop, and its bytes in the model's own dtype."""

    way: Way
    times: int
    by_hop: tuple[Traffic, ...]
    plain_bytes: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Passed":
        """That of which these are the fields, as JSON values."""
        by_hop = tuple(Traffic(*hop) for hop in values["by_hop"])
        return cls(**{**values, "way": Way(*values["way"]), "by_hop": by_hop})


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The figures of one rank at one site. `coded`: the plan has a codec for it.

    `plain_bytes`: what the same values take in the model's own dtype, sent by the same algorithm.
    `num_saturated`, `num_non_finite`: values that were clipped, or NaN or infinite; `num_guarded`: tokens that were
    coded in a safe form (simulated: of all ranks). `seconds`: where time went (`Clock`), empty unless asked for.
    `passed`: all of it by the way that it took. `samples`: what sampled sums told, where sums are sampled.
    """

    coded: bool
    kind: str = ""
    codecs: tuple[str, ...] = ()
    num_tokens: int
    wire_bytes: int
    plain_bytes: int
    num_values: int
    num_saturated: int = 0
    num_non_finite: int = 0
    num_guarded: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    passed: tuple[Passed, ...] = field(default=(), compare=False)  # equal reports may have taken other paths
    samples: Samples | None = None

    @property
    def bits_per_value(self) -> float | None:
        """Bits that a value took; None before anything was sent."""
        return 8 * self.wire_bytes / self.num_values if self.num_values else None

    def __add__(self, other: "SiteReport") -> "SiteReport":
        """The figures of two ranks at the same site for the same tokens."""
        samples = [each.samples for each in (self, other) if each.samples is not None]
        return SiteReport(
            coded=self.coded,
            kind=self.kind,
            codecs=self.codecs,
            passed=self.passed + other.passed,
            samples=reduce(add, samples) if samples else None,
            num_tokens=max(self.num_tokens, other.num_tokens),
            wire_bytes=self.wire_bytes + other.wire_bytes,
            plain_bytes=self.plain_bytes + other.plain_bytes,
            num_values=self.num_values + other.num_values,
        ).counting([self, other])

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SiteReport":
        """The report of which these are the fields, as JSON values."""
        samples = values.get("samples")
        more = {
            "codecs": tuple(values.get("codecs", ())),
            "passed": tuple(Passed.from_json(each) for each in values.get("passed", ())),
            "samples": None if samples is None else Samples(**samples),
        }
        return cls(**{**values, **more})

    def counting(self, ranks: Sequence["SiteReport"]) -> "SiteReport":
        """This report with what was clipped, or not finite, on all of `ranks`."""
        return replace(self, **{name: sum(getattr(rank, name) for rank in ranks) for name in COUNTS})


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """The figures of one rank, or, simulated, of the first rank of every pipeline stage; sites not coded kept apart.

    Printed, it is a table.
    `prompts`: long prompts by how they ran, in turns or why not, where they were to. `distributions`: of sampled sums,
    by kind of site.
    """

    sites: Mapping[str, SiteReport]
    distributions: Mapping[str, Distributions] = field(default_factory=dict)
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
        sites = {name: SiteReport.from_json(site) for name, site in values["sites"].items()}
        distributions = {kind: Distributions.from_json(each) for kind, each in values["distributions"].items()}
        return cls(sites=sites, distributions=distributions, prompts=values["prompts"])
