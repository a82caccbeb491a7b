"""Tensor-parallel LLM inference whose devices send each other 4 bits a value."""

from narrowcast.attach import attach
from narrowcast.calibration import calibrate
from narrowcast.codecs import PRESETS
from narrowcast.collectives import all_gather, all_reduce, all_to_all, broadcast, recv, reduce_scatter, send
from narrowcast.errors import InvalidInputError, NarrowcastError, PeerLostError, PlanError
from narrowcast.plan import Plan

__all__ = [
    "PRESETS",
    "InvalidInputError",
    "NarrowcastError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attach",
    "broadcast",
    "calibrate",
    "recv",
    "reduce_scatter",
    "send",
]
