"""A KL divergence in words: how much of it people would notice. docs/quality.md derives the limits."""

import math
from typing import Literal

Verdict = Literal["none noticed", "slight", "visible", "unusable"]

# In nats, the most that each word stands for.
LIMITS: dict[Verdict, float] = {"none noticed": 0.01, "slight": 0.05, "visible": 0.4, "unusable": math.inf}


def in_words(kl_nats: float) -> Verdict:
    """The verdict on a mean KL divergence from the uncompressed model; what is not finite is unusable."""
    return next((word for word, most in LIMITS.items() if kl_nats <= most), "unusable")
