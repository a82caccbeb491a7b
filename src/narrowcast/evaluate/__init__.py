"""How much a coded model differs from the uncompressed one, how surely, where from, and whether it got worse."""

from narrowcast.evaluate.gate import DEFAULT_TOLERANCE, LEVEL, Change, Verdict, changes
from narrowcast.evaluate.intervals import Interval, Items
from narrowcast.evaluate.scores import PERCENTILES, Score, compare, log_probs, score_simulated
from narrowcast.evaluate.sites import SiteError, site_errors

__all__ = [
    "DEFAULT_TOLERANCE",
    "LEVEL",
    "PERCENTILES",
    "Change",
    "Interval",
    "Items",
    "Score",
    "SiteError",
    "Verdict",
    "changes",
    "compare",
    "log_probs",
    "score_simulated",
    "site_errors",
]
