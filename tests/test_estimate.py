"""`narrowcast estimate`: bytes as they are counted and times, from a model's config alone."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import refused, run
from conftest import MODEL
from models import save_random
from narrowcast import PRESETS, attach, calibrate
from narrowcast.codecs import Ranges
from narrowcast.collectives import ALGORITHMS, Hops
from narrowcast.collectives.base import Algorithm, CodingWork
from narrowcast.engines import load_engine
from narrowcast.launch.link import Link
from narrowcast.perf.census import starred
from narrowcast.perf.cost import MESSAGE_S, Coding, CostModel
from narrowcast.perf.estimate import estimate
from narrowcast.plan.decisions import Choice
from narrowcast.plan.split import Split

NO_CODING = Coding(encode_s=0.0, decode_s=0.0)
ONE, TWO, NATIVE = Choice("coded", "one_shot"), Choice("coded", "two_shot"), Choice("native")


def model_of(link: str, world_size: int, coding: Coding = NO_CODING, preset: str = "int4-feature") -> CostModel:
    recipe = PRESETS[preset]
    hops = Hops(tuple(recipe.codec(Ranges.of(torch.ones(sources, 1, 4096))) for sources in (world_size, 1)))
    return CostModel(
        hops=hops,
        num_features=4096,
        world_size=world_size,
        link=Link.parse(link),
        transport="tcp",
        coded=coding,
        plain=NO_CODING,
    )


def seconds(model: CostModel, choice: Choice, num_tokens: int) -> float:
    found = model.sum_s(choice, num_tokens)
    assert found is not None
    return found


def test_on_a_slow_link_payload_bytes_decide() -> None:
    """4.19 of 16 bits: two ranks swap payloads, whose bytes over the rate are the limit, and the time."""
    model = model_of("100Mbps,0ms", 2)
    nbytes = model.hops.codecs[0].payload_nbytes(512, 4096)
    limit_s = model.link.transfer_s(nbytes)
    assert limit_s < seconds(model, ONE, 512) < 1.06 * limit_s
    assert seconds(model, NATIVE, 512) / seconds(model, ONE, 512) == pytest.approx(16 / 4.1875, rel=0.03)


def test_delays_count_for_each_message() -> None:
    near, far = model_of("1Gbps,0ms", 4), model_of("1Gbps,10ms", 4)
    for choice, messages in ((ONE, 1), (TWO, 2), (NATIVE, 6)):
        assert seconds(far, choice, 1) - seconds(near, choice, 1) == pytest.approx(messages * 0.010)


def test_two_shot_sends_less_and_waits_more() -> None:
    model = model_of("1Gbps,1ms", 8)
    assert seconds(model, ONE, 1) < seconds(model, TWO, 1)
    assert seconds(model, ONE, 4096) > seconds(model, TWO, 4096)


def test_coding_hides_behind_the_link_or_the_link_behind_coding() -> None:
    free, slow = model_of("1Gbps,0ms", 2), model_of("1Gbps,0ms", 2, Coding(encode_s=1e-9, decode_s=1e-9))
    coding_s = 3 * 4096 * 4096 * 1e-9
    assert seconds(slow, ONE, 4096) < seconds(free, ONE, 4096) + coding_s / 8, "64 chunks hide it"
    assert seconds(slow, ONE, 1) == pytest.approx(seconds(free, ONE, 1) + 3 * 4096 * 1e-9), "one chunk hides nothing"


def test_break_even_is_where_the_times_cross() -> None:
    model = model_of("1Gbps,0ms", 2, Coding(encode_s=2e-7, decode_s=2e-7))
    assert model.break_even_nbytes(ONE) is None, "so slow a codec never pays"
    model = model_of("1Gbps,0ms", 2, Coding(encode_s=3e-9, decode_s=3e-9))
    nbytes = model.break_even_nbytes(ONE)
    assert nbytes is not None
    num_tokens = nbytes // 8192
    assert seconds(model, ONE, num_tokens) < seconds(model, NATIVE, num_tokens)


def toy_algorithm(work: CodingWork | None) -> Algorithm:
    """One that sends what one_shot sends, and says that it works that much."""
    return replace(ALGORITHMS["one_shot"], work=lambda num_values, world_size: work)


def test_an_algorithm_is_predicted_by_what_it_says_of_itself_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one, of any name: by its latencies and the values that it codes."""
    monkeypatch.setitem(ALGORITHMS, "silent", toy_algorithm(None))
    monkeypatch.setitem(ALGORITHMS, "three_shot", toy_algorithm(CodingWork(3, 1e6, 2e6)))
    model = model_of("1Gbps,1ms", 2, Coding(encode_s=1e-9, decode_s=2e-9))
    assert model.sum_s(Choice("coded", "silent"), 1) is None
    assert model.break_even_nbytes(Choice("coded", "silent")) is None
    free = model_of("1Gbps,1ms", 2)
    latency_s = 0.001 + MESSAGE_S["tcp"]
    more_s = 2 * latency_s + 1e6 * 1e-9 + 2e6 * 2e-9
    assert seconds(model, Choice("coded", "three_shot"), 1) == pytest.approx(seconds(free, ONE, 1) + more_s, rel=1e-2)
    report = estimate(MODEL, Split(tp_size=2), [], link=Link.parse("1Gbps,1ms"))
    times = {time.algorithm: time for time in report[0].times}
    assert times.keys() == {"native", *ALGORITHMS}
    assert times["silent"].prompt_ms is None and times["silent"].token_ms is None
    assert times["three_shot"].token_ms is not None


# What travels.


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("llama-odd", Split(tp_size=3)),
        ("phi3", Split(tp_size=2)),  # fused projections are gathered
        ("olmo2", Split(tp_size=2)),  # norms over all heads
        ("llama", Split(tp_size=2, pp_size=2)),
        ("mixtral", Split(tp_size=2)),
        ("mixtral", Split(tp_size=2, experts="all_reduce")),
        ("qwen3-moe", Split(tp_size=2, experts="all_to_all")),
    ],
)
def test_bytes_are_those_that_are_counted_when_the_model_runs(family: str, split: Split, tmp_path: Path) -> None:
    """And but for tokens that travel to experts, no weight is needed for it."""
    folder, codec = save_random(family, tmp_path / "model"), "int8-group128"
    model = load_engine().load(folder)
    ids = torch.randint(101, (1, 10), generator=torch.Generator().manual_seed(0))
    plan = calibrate(model, [ids], tp_size=split.tp_size, pp_size=split.pp_size, experts=split.experts, codec=codec)
    with attach(model, plan, simulate=True) as handle, torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    counted: dict[str, int] = defaultdict(int)
    for name, site in handle.report().sites.items():
        counted[starred(name)] += site.wire_bytes
    if split.experts != "all_to_all":
        (folder / "model.safetensors").unlink()
    (_, found) = estimate(folder, split, [codec], input_len=10)
    assert {site.site: site.prompt_bytes for site in found.sites} == counted


def estimated(folder: Path, report: Path, *options: str) -> dict[str, Any]:
    shown = run("estimate", folder, "--json", report, *options)
    assert "a prompt of" in shown and ("pays from" in shown) == ("--link" in options)
    values: dict[str, Any] = json.loads(report.read_text(encoding="utf8"))
    return values


def test_the_command_shows_what_would_travel_before_there_is_a_plan(tmp_path: Path) -> None:
    """Per token of two ranks: 134 of 512 bytes at each sum; an embedding row and half of the logits as they are."""
    asked = "-tp", "2", "--input-len", "10", "--codec", "int4-feature"
    plain, coded = estimated(MODEL, tmp_path / "r.json", *asked)["codecs"]
    assert (plain["codec"], coded["codec"], coded["bits_per_value"]) == ("bf16", "int4-feature", 4.1875)
    for codec, nbytes in ((plain, 512), (coded, 134)):
        rows = {row.pop("site"): row for row in codec["sites"]}
        each = {"kind": "sum", "number": 8, "prompt_bytes": 80 * nbytes, "token_bytes": 8 * nbytes}
        assert rows["model.layers.*.mlp.down_proj"] == rows["model.layers.*.self_attn.o_proj"] == each
        assert (rows["model.embed_tokens"]["prompt_bytes"], rows["lm_head"]["prompt_bytes"]) == (10 * 512, 4096)
    assert "1.90 times fewer" in run("estimate", MODEL, *asked)


def test_the_command_reads_nothing_but_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    asked = "-tp", "4", "--link", "1Gbps,0.1ms", "--codec", "int4-feature"
    report = estimated(folder, tmp_path / "r.json", *asked)
    plain, coded = ({row["algorithm"]: row for row in codec["times"]} for codec in report["codecs"])
    assert list(plain) == ["native", "one_shot", "two_shot"] and list(coded) == ["one_shot", "two_shot"]
    assert coded["two_shot"]["prompt_ms"] < plain["two_shot"]["prompt_ms"] < plain["native"]["prompt_ms"]
    longer = estimated(folder, tmp_path / "r.json", *asked, "--input-len", "512")["codecs"][0]["times"][0]
    shorter = estimated(folder, tmp_path / "r.json", *asked, "--input-len", "64")["codecs"][0]["times"][0]
    assert longer["prompt_ms"] > shorter["prompt_ms"] and longer["token_ms"] == shorter["token_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-tp", "2", "--link", "fast"), "expected RATE,DELAY"),
        (("-tp", "1"), "above 1, found one rank"),
        (("-tp", "2", "--transport", "pigeon"), "one of auto, tcp, torch"),
        (("-tp", "2", "--codec", "int9"), "int9"),
        (("-tp", "2", "--input-len", "513"), "512 tokens at most, the model's context, found 513"),
    ],
)
def test_wrong_options_are_told(options: tuple[str, ...], message: str) -> None:
    assert message in refused("estimate", MODEL, *options)
