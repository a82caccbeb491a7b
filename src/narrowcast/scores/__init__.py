"""Scores of a coded model against the uncompressed one, with intervals."""

from narrowcast.scores.intervals import Interval, Items, written
from narrowcast.scores.scores import PERCENTILES, Score, Scorer, compare, kl_nats, log_probs

__all__ = ["PERCENTILES", "Interval", "Items", "Score", "Scorer", "compare", "kl_nats", "log_probs", "written"]
