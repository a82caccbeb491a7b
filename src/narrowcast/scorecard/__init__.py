"""Baselines of a server: a fixed workload, what came of it, and the scorecard of what moved since then."""

from narrowcast.scorecard.card import DEFAULT_NATS, DEFAULT_TOLERANCE, Scorecard
from narrowcast.scorecard.record import Record, measured
from narrowcast.scorecard.scenario import SCENARIOS, Scenario
from narrowcast.scorecard.subject import Subject, at, started
from narrowcast.scorecard.workload import Workload

__all__ = [
    "DEFAULT_NATS",
    "DEFAULT_TOLERANCE",
    "SCENARIOS",
    "Record",
    "Scenario",
    "Scorecard",
    "Subject",
    "Workload",
    "at",
    "measured",
    "started",
]
