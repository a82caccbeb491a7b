"""Decoding steps on the CPU: our attention of few queries, caches that grow in place, short forwards."""

from narrowcast.engines.transformers.decoding.families import shorten_steps
from narrowcast.engines.transformers.decoding.interface import NAME, choose
from narrowcast.engines.transformers.decoding.layers import GATE_UP, QKV

__all__ = ["GATE_UP", "NAME", "QKV", "choose", "shorten_steps"]
