"""Long prompts in halves, and how they ran."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

MIN_TOKENS = 32  # of a prompt that may be cut
PIPELINED_TOKENS = 128  # from which on two halves in two stages cost nothing (64) and gain (decision 0034)

Chunks = Literal["auto", 1, 2]


@dataclass
class Prompts:
    """Prompts of `min_tokens` or more are to run in halves. `counted`: those that came so far, by how they ran."""

    min_tokens: int = MIN_TOKENS
    counted: Counter[str] = field(default_factory=Counter)

    def halves(self, num_tokens: int) -> list[tuple[int, int]]:
        """The first token of each half of a prompt, and the one after its last; none of a short one."""
        half = num_tokens // 2
        return [(0, half), (half, num_tokens)] if num_tokens >= self.min_tokens else []

    def in_halves(self) -> None:
        """Count a prompt that runs so."""
        self.counted["in halves"] += 1

    def as_one(self, why: str) -> None:
        """Count a long prompt that runs as one forward."""
        self.counted[f"one forward: {why}"] += 1
