"""The figures of all ranks: scrapes ask for them, and the model's thread posts them at its next step."""

from collections.abc import Callable, Sequence
from threading import Condition

from narrowcast.monitoring import Snapshot

PATIENCE_S = 3.0  # of a scrape: Prometheus gives up after 10, and a step with long prompts may take as long


class Board:
    """The last known figures of the ranks. `wake` has the model's thread take a step though nobody wants a token.

    A scrape waits for `patience_s` at most.
    """

    def __init__(self, wake: Callable[[], None], *, patience_s: float = PATIENCE_S) -> None:
        self.usage = 0.0  # the share of the cache that requests use, after the last step
        self._wake, self._patience_s = wake, patience_s
        self._changed = Condition()
        self._asked = True  # at the start, so that something is known from then on
        self._num_begun = self._num_posted = 0  # gatherings
        self._texts: Sequence[str] = ()
        self._closed = False

    def snapshots(self) -> list[Snapshot]:
        """The ranks' figures from now, shared by all who ask meanwhile; the last ones where no step comes in time."""
        with self._changed:
            self._asked, number = True, self._num_begun + 1
        self._wake()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._num_posted >= number, self._patience_s)
            texts = self._texts
        return list(map(Snapshot.from_text, texts))

    # The model's thread

    def begin(self) -> bool:
        """True if somebody asks, and figures are to be gathered."""
        with self._changed:
            asked, self._asked = self._asked, False
            self._num_begun += asked
            return asked

    def post(self, texts: Sequence[str]) -> None:
        """Answer those who asked before `begin` with the ranks' snapshots."""
        with self._changed:
            self._texts, self._num_posted = texts, self._num_begun
            self._changed.notify_all()

    def close(self) -> None:
        """Keep nobody waiting from now on: there are no more steps."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
