"""Collectives on coded tensors: functional, SUM only, the same bits on every rank."""

from narrowcast.collectives import simulate
from narrowcast.collectives.algorithms import (
    ALGORITHMS,
    NODE_ALGORITHMS,
    check_algorithm,
    checked_stages,
    choose,
    named,
)
from narrowcast.collectives.base import Stages
from narrowcast.collectives.gather import all_gather, all_gather_steps
from narrowcast.collectives.pending import Pending, transport_of
from narrowcast.collectives.reduce import all_reduce, all_reduce_steps, reduce_scatter, reduce_scatter_steps

__all__ = [
    "ALGORITHMS",
    "NODE_ALGORITHMS",
    "Pending",
    "Stages",
    "all_gather",
    "all_gather_steps",
    "all_reduce",
    "all_reduce_steps",
    "check_algorithm",
    "checked_stages",
    "choose",
    "named",
    "reduce_scatter",
    "reduce_scatter_steps",
    "simulate",
    "transport_of",
]
