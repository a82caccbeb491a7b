"""Collectives on coded tensors: functional, SUM only, the same bits on every rank."""

from narrowcast.collectives import simulate
from narrowcast.collectives.algorithms import (
    ALGORITHMS,
    NODE_ALGORITHMS,
    check_algorithm,
    check_name,
    checked_groups,
    checked_hops,
    choose,
    named,
)
from narrowcast.collectives.all_to_all import all_to_all, all_to_all_steps
from narrowcast.collectives.base import Hops
from narrowcast.collectives.gather import (
    all_gather,
    all_gather_features_steps,
    all_gather_steps,
    broadcast,
    broadcast_steps,
)
from narrowcast.collectives.pending import Pending, transport_of
from narrowcast.collectives.point_to_point import recv, recv_steps, send, send_steps
from narrowcast.collectives.reduce import (
    all_reduce,
    all_reduce_steps,
    deferred_all_reduce_steps,
    reduce_scatter,
    reduce_scatter_steps,
)

__all__ = [
    "ALGORITHMS",
    "NODE_ALGORITHMS",
    "Hops",
    "Pending",
    "all_gather",
    "all_gather_features_steps",
    "all_gather_steps",
    "all_reduce",
    "all_reduce_steps",
    "all_to_all",
    "all_to_all_steps",
    "broadcast",
    "broadcast_steps",
    "check_algorithm",
    "check_name",
    "checked_groups",
    "checked_hops",
    "choose",
    "deferred_all_reduce_steps",
    "named",
    "recv",
    "recv_steps",
    "reduce_scatter",
    "reduce_scatter_steps",
    "send",
    "send_steps",
    "simulate",
    "transport_of",
]
