"""Progress on stderr: under a bar where somebody watches, otherwise in a line now and then."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from narrowcast.launch import is_first_rank
from narrowcast.progress import Progress, heard_by

FIRST_LINE_S, NEXT_LINE_S = 1.0, 10.0


class Screen(Protocol):
    """Where progress is shown."""

    def hear(self, said: object) -> None:
        """Show a `Progress`."""

    def close(self) -> None:
        """Leave nothing behind. What is heard afterwards is not shown."""


@contextmanager
def shown() -> Iterator[Screen]:
    """Show what is told in the meantime, on the first rank."""
    screen: Screen = Silence()
    if is_first_rank():
        console = Console(file=sys.stderr)  # as it is now: tasks are answered with their harness's words held back
        screen = Bar(console) if console.is_terminal else Lines(console)
    try:
        with heard_by(screen.hear):
            yield screen
    finally:
        screen.close()


class Silence:
    """Shows nothing."""

    def hear(self, said: object) -> None:
        """Not shown."""

    def close(self) -> None:
        """Nothing is left behind."""


class Bar:
    """One bar, of the step that goes on."""

    def __init__(self, console: Console) -> None:
        counted = TextColumn("{task.fields[counted]}")
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn()
        self._bars = Bars(*columns, console=console, transient=True)
        self._doing, self._closed = "", False

    def hear(self, said: object) -> None:
        """A new step begins a new bar."""
        if self._closed or not isinstance(said, Progress):
            return
        if said.doing != self._doing:
            self._doing = said.doing
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(said.doing, total=said.total, counted="")
            self._bars.start()
        self._bars.update(self._bars.task_ids[0], completed=said.done, counted=said.counted)

    def close(self) -> None:
        """Takes the bar away."""
        self._closed = True
        self._bars.stop()


class Lines:
    """A line after a second, and every ten seconds from then on."""

    def __init__(self, console: Console) -> None:
        self._console, self._last, self._begun = console, Progress(""), time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._thread.start()

    def hear(self, said: object) -> None:
        """The last step is the one that is told of."""
        if isinstance(said, Progress):
            self._last = said

    def close(self) -> None:
        """No line comes any more."""
        self._closed.set()
        self._thread.join()

    def _tell(self) -> None:
        wait_s = FIRST_LINE_S
        while not self._closed.wait(wait_s):
            said, passed_s = self._last, time.monotonic() - self._begun
            if said.doing:
                doing = " ".join(filter(None, (said.doing, said.counted)))
                line = f"narrowcast: {doing}; {passed_s:.0f} s so far"
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
                wait_s = NEXT_LINE_S
