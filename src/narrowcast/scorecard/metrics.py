"""A server's own words at /metrics: of itself, and of what its ranks send. Names: docs/monitoring.md."""

from dataclasses import dataclass
from typing import Self

from narrowcast.monitoring.scrape import Scrape
from narrowcast.serving.remote import AnswerError, Api

SENT, TOKENS, INFO, RANKS = (
    *("narrowcast_sent_bytes_total", "narrowcast_tokens_total"),
    *("narrowcast_info", "narrowcast_ranks"),
)


@dataclass(frozen=True)
class Metrics:
    """Bytes that all ranks have sent and tokens that they have processed, each rank's counted; words of the first."""

    sent_bytes: float
    tokens: float
    about: dict[str, str]

    @classmethod
    def of(cls, api: Api) -> Self | None:
        """Those of a server now; None of one that tells nothing of the kind."""
        try:
            scrape = Scrape.of(api.text("/metrics"))
        except (AnswerError, ValueError):
            return None
        if TOKENS not in scrape.series:
            return None
        labels = next((labels for labels, _ in scrape.series.get(INFO, ())), {})
        about = {name: value or "none" for name, value in labels.items() if name != "rank"}
        if RANKS in scrape.series:
            about["ranks"] = str(round(scrape.values(RANKS)[""]))
        return cls(scrape.values(SENT).get("", 0.0), scrape.values(TOKENS)[""], about)

    def sent_per_token(self, before: Self) -> float:
        """Bytes that a rank has sent since then, by token; of no tokens, none."""
        num_tokens = self.tokens - before.tokens
        return (self.sent_bytes - before.sent_bytes) / num_tokens if num_tokens > 0 else 0.0
