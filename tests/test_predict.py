"""`narrowcast predict`: from a model's config alone, times that follow the sizes, the link and the number of ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import MODEL
from narrowcast.cli import app
from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import Stages
from narrowcast.errors import InvalidInputError
from narrowcast.launch.link import Link
from narrowcast.perf.estimate import Coding, CostModel
from narrowcast.plan.decisions import Choice

NO_CODING = Coding(encode_s=0.0, decode_s=0.0)
ONE, TWO, NATIVE = Choice("coded", "one_shot"), Choice("coded", "two_shot"), Choice("native")


def model_of(link: str, world_size: int, coding: Coding = NO_CODING, preset: str = "int4-feature") -> CostModel:
    made = recipe(preset)
    stages = Stages(tuple(made.codec(Ranges.of(torch.ones(sources, 1, 4096))) for sources in (world_size, 1)))
    return CostModel(
        stages=stages,
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
    nbytes = model.stages.codecs[0].payload_nbytes(512, 4096)
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


def predicted(folder: Path, report: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["predict", str(folder), "--json", str(report), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "pays from" in done.output
    values: dict[str, Any] = json.loads(report.read_text(encoding="utf8"))
    return values


def test_predict_reads_nothing_but_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    report = predicted(folder, tmp_path / "r.json", "--tp", "4", "--link", "1Gbps,0.1ms", "--codec", "int4-feature")
    assert report["sites"] == {"num_features": 256, "num_sums": 16, "num_plain": 1, "num_logits": 4096}
    rows = {(row["codec"], row["algorithm"]): row for row in report["rows"]}
    assert list(rows) == [
        ("native", None),
        ("bf16", "one_shot"),
        ("bf16", "two_shot"),
        ("int4-feature", "one_shot"),
        ("int4-feature", "two_shot"),
    ]
    assert rows["int4-feature", "one_shot"]["bits_per_value"] == 4.1875
    assert rows["int4-feature", "two_shot"]["prefill_ms"] < rows["bf16", "two_shot"]["prefill_ms"]
    longer = predicted(folder, tmp_path / "r.json", "--tp", "4", "--link", "1Gbps,0.1ms", "--tokens", "2048")
    assert longer["rows"][0]["prefill_ms"] > rows["native", None]["prefill_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--link", "fast"), "expected RATE,DELAY"),
        (("--link", "1Gbps,1ms", "--tp", "1"), "expected --tp above 1"),
        (("--link", "1Gbps,1ms", "--transport", "pigeon"), "--transport tcp or torch"),
        (("--link", "1Gbps,1ms", "--codec", "int9"), "expected one of bf16"),
    ],
)
def test_wrong_options_are_told(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CliRunner().invoke(app, ["predict", str(MODEL), *options], catch_exceptions=False)
