"""A server's own words at /metrics: of itself, and of what its ranks send. Names: docs/monitoring.md."""

import re
from dataclasses import dataclass
from typing import Self

from narrowcast.serving.remote import AnswerError, Api

SENT, TOKENS, INFO, RANKS = (
    *("narrowcast_sent_bytes_total", "narrowcast_tokens_total"),
    *("narrowcast_info", "narrowcast_ranks"),
)
_SAMPLE = re.compile(r"^(narrowcast_\w+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


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
            found = _SAMPLE.findall(api.text("/metrics"))
        except AnswerError:
            return None
        totals = {name: sum(float(value) for each, _, value in found if each == name) for name in (SENT, TOKENS)}
        if not any(name == TOKENS for name, _, _ in found):
            return None
        about = next((dict(_LABEL.findall(labels)) for name, labels, _ in found if name == INFO), {})
        about = {name: value or "none" for name, value in about.items() if name != "rank"}
        for ranks in (value for name, _, value in found if name == RANKS):
            about["ranks"] = f"{float(ranks):g}"
        return cls(totals[SENT], totals[TOKENS], about)

    def sent_per_token(self, before: Self) -> float:
        """Bytes that a rank has sent since then, by token; of no tokens, none."""
        num_tokens = self.tokens - before.tokens
        return (self.sent_bytes - before.sent_bytes) / num_tokens if num_tokens > 0 else 0.0
