"""Benchmarks: rows, yardsticks, figures."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from narrowcast.cli import bench
from narrowcast.cli.bench import THOUSANDS, number
from narrowcast.errors import InvalidInputError
from narrowcast.perf import timing
from narrowcast.perf.shapes import shape_of
from test_cli import narrowcast, refused

ROWS = {
    "codec": {"codec", "op", "device", "path", "dtype", "shape", "gbps", "memcpy_gbps"},
    "collective": {
        "transport", "codec", "algorithm", "world_size", "nbytes", "link", "median_us", "p99_us", "wire_bytes",
        "limit_us",
    },
    "model": {"link", "codec", "transport", "prefill_tokens", "ttft_ms", "decode_ms_per_token"},
}  # fmt: skip
LINK = "1Gbps,0.1ms"


# Figures.


def test_a_run_lasts_from_the_last_start_to_the_last_end() -> None:
    assert timing.over_ranks([[(0, 50), (60, 80)], [(10, 30), (55, 100)]]) == [40e-9, 40e-9]


def test_cases_take_turns() -> None:
    done: list[str] = []
    cases = {name: timing.Case(lambda name=name: done.append(name), lambda: done.append("-")) for name in "ab"}
    spans = timing.interleaved(cases, 2)
    assert "".join(done) == "-a-b-a-b" and [len(each) for each in spans.values()] == [2, 2]


def test_p99_and_spread() -> None:
    assert timing.p99(range(1, 101)) == 99 and timing.p99([3, 1, 2]) == 3
    assert timing.spread([1, 2, 3]) == 0.25 and timing.spread([1]) == 0


@pytest.mark.parametrize("text", ["1M", "20M", "380M", "1.5B", "7B"])
def test_shapes_have_about_as_many_parameters_as_asked_for(text: str) -> None:
    asked = number("--parameters", text, THOUSANDS)
    assert abs(shape_of(round(asked)).num_parameters / asked - 1) < 0.15


# The commands.

TINY = {
    "codec": ["--codec", "int4-feature", "--codec", "bf16", "--shape", "4x256", "--seconds", 0],
    "collective": ["--bytes", "4K..16K", "--codec", "int4-feature", "--seconds", 0],
    "model": ["--parameters", "1M", "--prefill", 8, "--decode", 2, "--rounds", 1],
}


def report_of(command: str, folder: Path, *options: object) -> dict[str, object]:
    path = folder / "report.json"
    narrowcast("bench", command, *TINY[command], "--json", path, *options)
    report = json.loads(path.read_text(encoding="utf8"))
    assert {"date", "command", "versions", "machine", "rows"} <= report.keys()
    assert report["command"].startswith(f"narrowcast bench {command} ") and report["machine"]["cores"] == os.cpu_count()
    assert all(row.keys() == ROWS[command] for row in report["rows"])
    return report


@pytest.mark.parametrize("command", ROWS)
def test_rows_and_picture(command: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    rows = report_of(command, tmp_path, "--plot", picture)["rows"]
    assert {row.get("link") for row in rows} == {None} and {row["codec"] for row in rows} >= {"int4-feature"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exists" in refused("bench", command, *TINY[command], "--plot", picture)


def test_rows_on_a_link(emulator: None, tmp_path: Path) -> None:
    rows = report_of("collective", tmp_path, "--link", LINK)["rows"]
    assert {row["link"] for row in rows} == {"1Gbps,100us"}
    for row in rows:
        assert row["limit_us"] >= 100 and row["median_us"] > row["limit_us"] and row["wire_bytes"] > 0


def test_each_size_starts_with_the_yardsticks(tmp_path: Path) -> None:
    """Plain sockets with as many bytes as each sum sends, then the group's own sum, then ours."""
    rows = report_of("collective", tmp_path, "--world-size", 3)["rows"]
    of_one = [row for row in rows if row["nbytes"] == 16384]
    kinds = [row["codec"] for row in of_one]
    assert kinds == sorted(kinds, key=["raw", "native", "int4-feature"].index)
    raw = [row["wire_bytes"] for row in of_one if row["codec"] == "raw"]
    for row in of_one:
        assert min(abs(row["wire_bytes"] - each) for each in raw) <= 2


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: bench.collective(link=["slow"]), "link: expected RATE,DELAY"),
        (lambda: bench.collective(codec=["int9"]), "codec preset: expected one of"),
        (lambda: bench.collective(algorithm=["hierarchical"]), "--algorithm: expected one of auto, one_shot, two_shot"),
        (lambda: bench.collective(transport=["pigeon"]), "--transport: expected one of torch"),
        (lambda: bench.collective(sizes=["4M..1K"]), "--bytes: expected SMALLEST..LARGEST"),
        (lambda: bench.collective(sizes=["much"]), "--bytes: expected a number"),
        (lambda: bench.codec(shape="512"), "--shape: expected TOKENSxFEATURES"),
        (lambda: bench.codec(dtype="int8"), "--dtype: expected one of bf16, fp16, fp32"),
        (lambda: bench.model(tp=1), "--tp: expected 2 or more"),
        (lambda: bench.model(parameters="many"), "--parameters: expected a number"),
    ],
)
def test_wrong_options_are_refused(call: Callable[[], None], expected: str) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        call()
    assert str(refusal.value).startswith(expected)
