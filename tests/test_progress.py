"""How far long work is: who hears it, and what is shown of it."""

import io
import os
import threading
import time

import pytest
from rich.console import Console

from narrowcast.cli import progress
from narrowcast.cli.progress import Bar, Lines, shown
from narrowcast.launch import Ranks
from narrowcast.progress import Progress, heard_by, tell, told


def test_parts_are_told_when_they_begin_to_whoever_listens() -> None:
    assert list(told([1, 2], "unheard")) == [1, 2]
    heard: list[object] = []
    with heard_by(heard.append):
        parts = told(["a", "b"], "reading")
        assert heard == []
        assert next(parts) == "a" and heard == [Progress("reading", 0, 2)]
        assert list(parts) == ["b"] and heard[1:] == [Progress("reading", 1, 2)]
    tell(Progress("unheard"))
    assert len(heard) == 2


def test_the_innermost_listener_hears() -> None:
    outer: list[object] = []
    inner: list[object] = []
    with heard_by(outer.append):
        with heard_by(inner.append):
            tell("within")
        tell("without")
    assert (outer, inner) == (["without"], ["within"])


def test_threads_are_heard_too() -> None:
    """Ranks load models in a thread of its own."""
    heard: list[object] = []
    with heard_by(heard.append):
        thread = threading.Thread(target=tell, args=("from a thread",))
        thread.start()
        thread.join()
    assert heard == ["from a thread"]


def say_rank() -> None:
    tell(f"rank {os.environ['RANK']}")


def test_the_first_of_ranks_is_heard_where_they_were_started() -> None:
    heard: list[object] = []
    with heard_by(heard.append), Ranks(2) as ranks:
        ranks.run(say_rank)
        ranks.run(say_rank)
    assert heard == [Progress("starting 2 ranks"), "rank 0", "rank 0"]


def console(*, watched: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=watched, width=80), out


def test_short_work_says_nothing_where_nobody_watches_and_long_work_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, said = console(watched=False)
    lines = Lines(short)
    lines.hear(Progress("loading"))
    lines.close()
    assert said.getvalue() == ""

    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.01)
    monkeypatch.setattr(progress, "NEXT_LINE_S", 0.01)
    long, said = console(watched=False)
    lines = Lines(long)
    lines.hear("something else")
    lines.hear(Progress("loading"))
    wait_for(said, "narrowcast: loading; 0 s so far\n")
    lines.hear(Progress("trying, step", 3))
    wait_for(said, "narrowcast: trying, step 3; 0 s so far\n")
    lines.hear(Progress("reading [x]", 3, 8))
    wait_for(said, "narrowcast: reading [x] 3 of 8; 0 s so far\n")
    lines.close()
    length = len(said.getvalue())
    lines.hear(Progress("afterwards"))
    time.sleep(0.05)
    assert len(said.getvalue()) == length


def wait_for(out: io.StringIO, line: str) -> None:
    deadline = time.monotonic() + 30
    while line not in out.getvalue():
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)


def test_a_watched_bar_shows_one_step_at_a_time_and_goes_away() -> None:
    watched, said = console(watched=True)
    bar = Bar(watched)
    bar.hear(Progress("loading"))
    bar.hear(Progress("reading", 3, 8))
    bar.close()
    assert "loading" in said.getvalue() and "3 of 8" in said.getvalue()
    assert said.getvalue().endswith("\x1b[1A\x1b[2K")  # its line is erased
    length = len(said.getvalue())
    bar.hear(Progress("afterwards"))
    assert len(said.getvalue()) == length


def test_other_ranks_than_the_first_show_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.setenv("RANK", "1")
    with shown():
        tell(Progress("loading"))
        time.sleep(0.05)
    assert capfd.readouterr().err == ""
