"""Rank processes of tests: one thread each, and an answer from each one alone."""

from typing import Any

import narrowcast.launch
from narrowcast.launch.process import Outcome
from narrowcast.launch.ranks import PRELOADED
from narrowcast.transport import DEFAULT_TIMEOUT_S

LIMIT_S = 90
PRELOADED.update({"hypothesis", "pytest", "_pytest"})  # modules of tests import them


class Ranks(narrowcast.launch.Ranks):
    """Ranks that compute as this process does, and that a test may kill."""

    def __init__(self, world_size: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(world_size, timeout_s=timeout_s, num_threads=1)

    def result(self, rank: int) -> Any:
        """The result of what was started, from `rank`; its error if it raised."""
        if not self.pipes[rank].poll(LIMIT_S):
            self.close()
            raise TimeoutError(f"rank {rank} gave no answer in {LIMIT_S} s")
        outcome, result = self.answer(rank)
        if outcome != Outcome.RETURNED:
            self.close()
            raise result
        return result
