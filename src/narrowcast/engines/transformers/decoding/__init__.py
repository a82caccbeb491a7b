"""Decoding steps on the CPU: our attention of few queries."""

from narrowcast.engines.transformers.decoding.interface import NAME, choose

__all__ = ["NAME", "choose"]
