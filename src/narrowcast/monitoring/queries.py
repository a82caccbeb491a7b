"""Questions to Prometheus, in PromQL, that alerts and the dashboard share: each gives a figure of servers, or of sites.

Ranks are added up; what else a target is labelled with stays.
"""

from dataclasses import dataclass

CODED = 'codec!="none"'


@dataclass(frozen=True)
class Queries:
    """Over a `window`, such as "10m", of the series that `where` selects, such as 'instance="a"'. `offset`: earlier."""

    window: str
    where: str = ""
    offset: str = ""

    def series(self, name: str, where: str = "") -> str:
        """A metric by its full name, of what is selected."""
        selected = ",".join(filter(None, (self.where, where)))
        return name + (f"{{{selected}}}" if selected else "")

    def over(self, function: str, name: str, where: str = "") -> str:
        """A function of the window, such as "rate", of a metric."""
        before = f" offset {self.offset}" if self.offset else ""
        return f"{function}({self.series(name, where)}[{self.window}]{before})"

    def total(self, name: str, *labels: str, where: str = "", function: str = "rate") -> str:
        """The same, added up over ranks and `labels`."""
        return f"sum without ({', '.join(('rank', *labels))}) ({self.over(function, name, where)})"

    def error(self) -> str:
        """By site: the relative error of sampled sums."""
        return self._error_over("sum")

    def error_ratio(self) -> str:
        """By site: the same over the error that the plan expects."""
        return self._error_over("expected_error")

    def _error_over(self, whole: str) -> str:
        noise, power = (self.total(f"narrowcast_site_{each}_squares_total") for each in ("error", whole))
        return f"sqrt({noise}\n  / ({power} > 0))"

    def num_sampled(self) -> str:
        """By site: the sums that were sampled."""
        return f"max without (rank) ({self.over('increase', 'narrowcast_site_sampled_sums_total')})"

    def clipped(self) -> str:
        """By site: values that were clipped, over values sent."""
        clipped, sent = (self.total(f"narrowcast_site_{each}_values_total") for each in ("clipped", "sent"))
        return f"{clipped}\n  / {sent}"

    def guarded(self) -> str:
        """By site: tokens that were coded in a safe form, over all tokens."""
        guarded, tokens = self.total("narrowcast_site_guarded_tokens_total"), self.total("narrowcast_tokens_total")
        return f"clamp_max({guarded}\n  / ignoring (site) group_left () {tokens}, 1)"  # some are coded twice

    def bits(self) -> str:
        """Bits that a coded value takes."""
        sent, values = (
            self.total(f"narrowcast_sent_{each}_total", "kind", "codec", "hop", where=CODED)
            for each in ("bytes", "values")
        )
        return f"8 * {sent}\n  / {values}"

    def planned_bits(self) -> str:
        """The same, as the plan has it."""
        return f"8 * {self.once('narrowcast_planned_bytes_per_value')}"

    def mean(self, name: str) -> str:
        """The mean of what a histogram counts."""
        return f"{self.over('rate', f'{name}_sum')}\n  / {self.over('rate', f'{name}_count')}"

    def quantile(self, share: float, name: str) -> str:
        """The value that such a share of what a histogram counts does not exceed, as far as its bounds tell."""
        return f"histogram_quantile({share:g}, {self.over('rate', f'{name}_bucket')})"

    def once(self, name: str) -> str:
        """A figure that all ranks have alike."""
        return f"max without (rank) ({self.series(name)})"
