"""The one way to start ranks: `run` for a single function, `Ranks` for one after another."""

from narrowcast.launch.link import Link
from narrowcast.launch.ranks import Ranks, run
from narrowcast.launch.torchrun import become_rank, is_first_rank, under_torchrun

__all__ = ["Link", "Ranks", "become_rank", "is_first_rank", "run", "under_torchrun"]
