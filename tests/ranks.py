"""Rank processes of tests: one thread each, and an answer from each one alone."""

from collections.abc import Callable
from typing import Any

import narrowcast.launch
from narrowcast.launch.process import Outcome
from narrowcast.launch.ranks import PRELOADED

LIMIT_S = 90
MOST_USES = 16
PRELOADED.update({"hypothesis", "pytest", "_pytest"})  # modules of tests import them


class Ranks(narrowcast.launch.Ranks):
    """Ranks that compute as this process does, and that a test may kill."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size, num_threads=1)
        self._num_uses = 0

    @property
    def fresh(self) -> bool:
        """True for ranks worth another function: gloo groups of the last ones stay, and wake up 100 times a second."""
        return self.alive and self._num_uses < MOST_USES

    def start(self, function: Callable[..., object], *args: Any) -> None:
        self._num_uses += 1
        super().start(function, *args)

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
