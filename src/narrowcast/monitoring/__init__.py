"""Watching what low-bit communication does as it serves: figures of all ranks, as Prometheus reads them."""

from narrowcast.monitoring.metrics import collector_of
from narrowcast.monitoring.snapshot import Snapshot

__all__ = ["Snapshot", "collector_of"]
