"""The figures of a live view, from scrapes of a server: rates of the last two, shares and errors of ten minutes."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self

from narrowcast.monitoring.alerts import ENOUGH
from narrowcast.monitoring.scrape import Scrape

KEPT_S = 600.0  # of scrapes: sums are sampled now and then
UNCODED = "none"

Shares = Mapping[str, float]  # by site


@dataclass(frozen=True)
class Window:
    """The work of a server from one scrape to another; without an earlier one since its start, for an unknown time."""

    now: Scrape
    earlier: Scrape | None = None

    def change(self, name: str, label: str = "") -> dict[str, float]:
        """The rise of counters by a label; nothing for what there is not."""
        before = {} if self.earlier is None else self.earlier.values(name, label)
        return {key: value - before.get(key, 0.0) for key, value in self.now.values(name, label).items()}

    def total(self, name: str) -> float | None:
        """The same, of all labels."""
        return self.change(name).get("")

    def rate(self, name: str) -> float | None:
        """The same a second."""
        change = self.total(name)
        if change is None or self.earlier is None:
            return None
        return change / max(self.now.at - self.earlier.at, 1e-9)

    def mean(self, name: str) -> float | None:
        """The mean of what a histogram counted; None for nothing."""
        number = self.total(f"{name}_count")
        return (self.total(f"{name}_sum") or 0.0) / number if number else None

    def shares(self, part: str, whole: str) -> dict[str, float]:
        """One counter's change over another's, by site."""
        wholes = self.change(whole, "site")
        return {site: value / wholes[site] for site, value in self.change(part, "site").items() if wholes.get(site)}

    def num_sampled(self) -> dict[str, float]:
        """The number of sampled sums, by site."""
        name = "narrowcast_site_sampled_sums_total"
        before = {} if self.earlier is None else self.earlier.largest(name, "site")
        return {site: number - before.get(site, 0.0) for site, number in self.now.largest(name, "site").items()}

    def errors(self, *, over: str = "sum") -> dict[str, float]:
        """Relative errors of sampled sums, by site; over the "expected_error" they are those over the plan's."""
        found = self.shares("narrowcast_site_error_squares_total", f"narrowcast_site_{over}_squares_total")
        return {site: sqrt(max(share, 0.0)) for site, share in found.items()}

    def bits(self) -> float | None:
        """Bits that a coded value took."""
        sent, values = (
            sum(value for codec, value in self.change(name, "codec").items() if codec != UNCODED)
            for name in ("narrowcast_sent_bytes_total", "narrowcast_sent_values_total")
        )
        return 8 * sent / values if values else None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All that a picture shows; None, or nothing, for what a server does not tell.

    `error_ratios`: `errors` over the plan's, of `num_sampled` sums: those of the last ten minutes, or of all time where
    these are not enough. `sites` are all that are coded; `non_finite` values of them, since the
    start of the server; `times_told`: there are latencies, if any tokens came.
    """

    about: Mapping[str, str]
    num_ranks: int
    num_heard: int
    processed_per_s: float | None
    generated_per_s: float | None
    read_per_s: float | None
    running: float | None
    waiting: float | None
    times_told: bool
    ttft_s: float | None
    gap_s: float | None
    bits: float | None
    planned_bits: float | None
    sent_bytes: float
    plain_bytes: float
    sent_per_s: float | None
    sites: tuple[str, ...]
    error_ratios: Shares
    errors: Shares
    num_sampled: Shares
    clipped: Shares
    guarded: Shares
    non_finite: Mapping[str, int]

    @classmethod
    def of(cls, step: Window, recent: Window) -> Self:
        """Rates of `step`, shares and errors of `recent`; what did not happen in these, since the server's start."""
        now, ever = step.now, Window(step.now)
        info = now.series.get("narrowcast_info", [])
        sampled = {site: number for site, number in recent.num_sampled().items() if number >= ENOUGH}
        errors, error_ratios = (
            ever.errors(over=whole)
            | {site: each for site, each in recent.errors(over=whole).items() if site in sampled}
            for whole in ("sum", "expected_error")
        )
        tokens = recent.total("narrowcast_tokens_total") or 0.0
        guarded = recent.change("narrowcast_site_guarded_tokens_total", "site")
        requests = (now.values(f"vllm:num_requests_{each}").get("") for each in ("running", "waiting"))
        latencies = (f"vllm:{each}_seconds" for each in ("time_to_first_token", "inter_token_latency"))
        ttft, gap = (step.mean(name) or recent.mean(name) or ever.mean(name) for name in latencies)
        running, waiting = requests
        processed = step.rate("narrowcast_tokens_total")
        planned = now.largest("narrowcast_planned_bytes_per_value").get("")
        models = now.values("vllm:num_requests_running", "model_name")
        return cls(
            about={**(dict(info[0][0]) if info else {}), "model": ", ".join(filter(None, models))},
            num_ranks=int(now.largest("narrowcast_ranks").get("", len(info))),
            num_heard=len(info),
            processed_per_s=None if processed is None else processed / max(len(info), 1),
            generated_per_s=step.rate("vllm:generation_tokens_total"),
            read_per_s=step.rate("vllm:prompt_tokens_total"),
            running=running,
            waiting=waiting,
            times_told="vllm:time_to_first_token_seconds_count" in now.series,
            ttft_s=ttft,
            gap_s=gap,
            bits=step.bits() or recent.bits() or ever.bits(),
            planned_bits=None if planned is None else 8 * planned,
            sent_bytes=ever.total("narrowcast_sent_bytes_total") or 0.0,
            plain_bytes=ever.total("narrowcast_uncompressed_bytes_total") or 0.0,
            sent_per_s=step.rate("narrowcast_sent_bytes_total"),
            sites=tuple(now.values("narrowcast_site_sent_values_total", "site")),
            error_ratios=error_ratios,
            errors=errors,
            num_sampled=ever.num_sampled() | sampled,
            clipped=recent.shares("narrowcast_site_clipped_values_total", "narrowcast_site_sent_values_total"),
            guarded={site: min(number / tokens, 1.0) for site, number in guarded.items() if tokens},
            non_finite={
                site: int(value)
                for name in ("narrowcast_site_sampled_non_finite_total", "narrowcast_site_non_finite_values_total")
                for site, value in now.values(name, "site").items()
                if value
            },
        )


class History:
    """Scrapes of one server, the last ten minutes of them; begun anew where it was started again."""

    def __init__(self) -> None:
        self._kept: deque[Scrape] = deque()

    def add(self, scrape: Scrape) -> None:
        """Keep one more."""
        if self._kept and not self._kept[-1].precedes(scrape):
            self._kept.clear()
        self._kept.append(scrape)
        while scrape.at - self._kept[0].at > KEPT_S:
            self._kept.popleft()

    def figures(self) -> Figures:
        """Those of what is kept, at least one."""
        *earlier, now = self._kept
        step, recent = (Window(now, earlier[place] if earlier else None) for place in (-1, 0))
        return Figures.of(step, recent)
