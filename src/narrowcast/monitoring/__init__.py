"""Watching what low-bit communication does as it serves: figures of all ranks, as Prometheus reads them.

`metrics` needs prometheus-client, and is imported where something is scraped.
"""

from narrowcast.monitoring.snapshot import Snapshot

__all__ = ["Snapshot"]
