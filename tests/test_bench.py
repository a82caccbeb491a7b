"""Benchmarks: rows, yardsticks, figures."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from commands import refused
from commands import run as run_command
from narrowcast import attach
from narrowcast.cli.bench import against_one_machine
from narrowcast.launch import Ranks
from narrowcast.perf import codec, collective, model, timing
from narrowcast.weights.layers import PackedLinear

ROWS = {
    "codec": {"codec", "op", "device", "path", "shape", "gbps", "memcpy_gbps"},
    "collective": {
        "transport", "codec", "algorithm", "world_size", "nbytes", "link", "median_us", "p99_us", "wire_bytes",
        "limit_us",
    },
    "model": {
        "link", "codec", "transport", "prompt_chunks", "cores", "weights", "prefill_tokens", "ttft_ms",
        "decode_ms_per_token",
    },
}  # fmt: skip
LINK = "1Gbps,0.1ms"
DRAW = Path(__file__).parents[1] / "benchmarks" / "pictures.py"


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


# The commands.

OPTIONS: dict[str, list[object]] = {
    "codec": ["--codec", "int4-feature", "--codec", "bf16", "--size", "2K"],
    "collective": ["--size", "4K..16K", "--codec", "int4-feature"],
    "model": ["--prompt-chunks", "1", "--prompt-chunks", "2"],
}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands measure little, and a small model."""
    monkeypatch.setattr(codec, "rows", partial(codec.rows, seconds_each=0))
    monkeypatch.setattr(collective, "DEFAULT", replace(collective.DEFAULT, seconds=0))
    shape = model.Shape(hidden_size=256, num_layers=1, intermediate_size=384)
    monkeypatch.setattr(model, "DEFAULT", replace(model.DEFAULT, shape=shape, prefill=8, decode=2, rounds=1))


def report_of(command: str, folder: Path, *options: object) -> dict[str, object]:
    path = folder / "report.json"
    with pytest.MonkeyPatch.context() as patch:  # workers of pytest have arguments of their own
        patch.setattr(sys, "argv", ["/somewhere/narrowcast", "bench", command])
        run_command("bench", command, *OPTIONS[command], "--json", path, *options)
    report = json.loads(path.read_text(encoding="utf8"))
    assert {"date", "command", "narrowcast", "machine", "rows"} <= report.keys()
    assert report["command"] == f"narrowcast bench {command}" and report["machine"]["cores"] == os.cpu_count()
    assert all(row.keys() == ROWS[command] for row in report["rows"])
    return report


@pytest.mark.parametrize("command", ROWS)
def test_rows_and_picture(command: str, tmp_path: Path) -> None:
    rows = report_of(command, tmp_path)["rows"]
    assert {row.get("link") for row in rows} == {None} and {row["codec"] for row in rows} >= {"int4-feature"}
    if command != "model":
        picture = tmp_path / "picture.png"
        subprocess.run([sys.executable, DRAW, tmp_path / "report.json", picture], check=True)
        assert picture.read_bytes().startswith(b"\x89PNG")


def layers_in_few_bits(job: model.Job, folder: Path) -> set[str]:
    parts, plans = model.loaded(job, folder)
    with attach(parts, plans["int4-feature"]):  # which is of the weights as they are stored
        return {each.matrix.format.name for each in parts.modules() if isinstance(each, PackedLinear)}


def test_weights_become_such_of_few_bits(ranks: Callable[[int], Ranks]) -> None:
    for weights, found in (("stored", set()), ("int4-group32", {"int4-group32", "int8-group32"})):  # logits take 8 bits
        job = replace(model.DEFAULT, weights=weights)
        with model.prepared(job) as folder:
            assert ranks(2).run(layers_in_few_bits, job, folder) == [found, found]


def test_one_machine_stands_beside_the_ranks(tmp_path: Path) -> None:
    """With all cores, and with those of a rank; whichever figures come out are compared."""
    rows = report_of("model", tmp_path)["rows"]
    cores = os.cpu_count() or 1
    share = max(1, cores // 2)
    alone = [row for row in rows if row["codec"] == "one machine"]
    assert [row["cores"] for row in alone] == sorted({cores, share}, reverse=True)
    assert all(row["cores"] == share for row in rows if row not in alone)


@pytest.mark.parametrize(
    ("prompt_ms", "token_ms", "told"),
    [
        (150.0, 12.0, ["slower for a prompt (150 ms, not 100) and slower for a token after it (12 ms, not 10)"]),
        (90.0, 12.0, ["each are slower for a token after it (12 ms, not 10)."]),
        (90.0, 9.9, []),
    ],
)
def test_ranks_that_are_slower_than_one_machine_are_told(prompt_ms: float, token_ms: float, told: list[str]) -> None:
    """By the fastest of ours."""
    one = {"codec": "one machine", "cores": 4, "ttft_ms": 100.0, "decode_ms_per_token": 10.0}
    native, slow = (one | {"codec": codec, "ttft_ms": 500.0, "decode_ms_per_token": 50.0} for codec in ("native", "x"))
    fast = slow | {"codec": "int4-feature", "ttft_ms": prompt_ms, "decode_ms_per_token": token_ms}
    sentences = list(against_one_machine([one, native, slow, fast], 2))
    assert len(sentences) == len(told)
    for sentence, part in zip(sentences, told, strict=True):
        assert sentence.startswith("Than one machine of 4 cores, 2 ranks of 4 cores each are ")
        assert part in sentence


def test_ranks_that_share_a_machine_are_told_so() -> None:
    ones = [{"codec": "one machine", "cores": cores, "ttft_ms": 100.0, "decode_ms_per_token": 10.0} for cores in (4, 2)]
    shared = ones[1] | {"codec": "int4-feature"}
    assert "share this machine's 4 cores" in " ".join(against_one_machine([*ones, shared], 2))
    assert not list(against_one_machine([ones[1], shared], 2))


def test_a_timeline_tells_where_each_rank_spends_an_answer(tmp_path: Path) -> None:
    """Computing, coding and waiting follow one another, and fill the prompt and the tokens after it."""
    path = tmp_path / "trace.json"
    report_of("model", tmp_path, "--timeline", path)
    events = json.loads(path.read_text(encoding="utf8"))["traceEvents"]
    assert {each["args"]["name"] for each in events if each["name"] == "process_name"} == {"rank 0", "rank 1"}
    ways = {each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert ways == {f"loopback, int4-feature, {how}" for how in ("one forward", "halves in turns")}
    for rank, thread in itertools.product((0, 1), (0, 1)):
        own = [each for each in events if (each["pid"], each["tid"]) == (rank, thread) and each["ph"] == "X"]
        forwards = [each for each in own if each["cat"] == "forward"]
        assert [each["name"] for each in forwards] == ["prompt of 8", "4 tokens"]
        parts = [each for each in own if each["cat"] != "forward"]
        assert {each["cat"] for each in parts} == {"compute", "encode", "exchange", "waiting", "decode"}
        assert any(each["name"] == "waiting model.layers.0.mlp.down_proj" for each in parts)
        for before, after in itertools.pairwise(parts):
            assert after["ts"] >= before["ts"] + before["dur"] - 0.01
        assert sum(each["dur"] for each in parts) == pytest.approx(sum(each["dur"] for each in forwards), rel=1e-3)
    assert "expected a new file" in refused("bench", "model", "--timeline", path)


def test_rows_on_a_link(emulator: None, tmp_path: Path) -> None:
    rows = report_of("collective", tmp_path, "--link", LINK)["rows"]
    assert {row["link"] for row in rows} == {"1Gbps,100us"}
    for row in rows:
        assert row["limit_us"] >= 100 and row["median_us"] > row["limit_us"] and row["wire_bytes"] > 0


def test_each_size_starts_with_the_yardsticks(tmp_path: Path) -> None:
    """Plain sockets with as many bytes as each sum sends, then the group's own sum, then ours."""
    rows = report_of("collective", tmp_path, "-tp", 3)["rows"]
    of_one = [row for row in rows if row["nbytes"] == 16384]
    kinds = [row["codec"] for row in of_one]
    assert kinds == sorted(kinds, key=["raw", "native", "int4-feature"].index)
    raw = [row["wire_bytes"] for row in of_one if row["codec"] == "raw"]
    for row in of_one:
        assert min(abs(row["wire_bytes"] - each) for each in raw) <= 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("collective", "--link", "slow"), "link: expected RATE,DELAY"),
        (("collective", "--codec", "int9"), "int9"),
        (("collective", "--transport", "pigeon"), "--transport: expected one of torch"),
        (("collective", "--size", "4M..1K"), "--size: expected SMALLEST..LARGEST"),
        (("collective", "--size", "much"), "--size: expected a number"),
        (("codec", "--link", LINK), "--link: expected none with codec"),
        (("model", "--size", "4M"), "--size: expected none with model"),
        (("model", "-tp", "1"), "-tp: expected 2 or more"),
        (("collective", "--weights", "int4-group32"), "--weights: expected none with collective"),
        (("codec", "--timeline", "x.json"), "--timeline: expected none with codec"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], expected: str) -> None:
    assert expected in refused("bench", *options)
