"""Evaluation: what a plan costs in answers, how surely that is known, and where it comes from."""

from narrowcast.evaluation.baseline import Baseline
from narrowcast.evaluation.evaluation import Evaluation
from narrowcast.evaluation.ranks import evaluate_on_ranks
from narrowcast.evaluation.simulated import evaluate
from narrowcast.evaluation.sites import SiteError, site_errors
from narrowcast.evaluation.verdict import Change, changes

__all__ = [
    "Baseline",
    "Change",
    "Evaluation",
    "SiteError",
    "changes",
    "evaluate",
    "evaluate_on_ranks",
    "site_errors",
]
