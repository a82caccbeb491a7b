"""The gate: its statistics on figures made up, and `evaluate --baseline` on the bundled model."""

import json
import math
import random
from pathlib import Path

import pytest

from commands import refused, run, save_plan
from conftest import MODEL
from narrowcast.evaluation.verdict import LEVEL, changes
from narrowcast.scores import Items


def items(*values: float) -> Items:
    return Items(values=values, weights=(10,) * len(values))


def verdicts(baseline: dict[str, Items], found: dict[str, Items], **options: float) -> dict[str, str]:
    return {name: change.verdict for name, change in changes(baseline, found, **options).items()}


KL = items(0.020, 0.025, 0.018, 0.031, 0.022, 0.027)


def plus(figure: Items, *more: float) -> Items:
    values = (value + more[place % len(more)] for place, value in enumerate(figure.values))
    return Items(values=tuple(values), weights=figure.weights)


def test_the_same_figures_are_the_same() -> None:
    shares = items(0.9, 0.8, 0.85, 0.95, 0.9, 0.7)
    figures = {"kl_nats": KL, "top1_agreement": shares, "nll_nats": plus(KL, 3.5)}
    assert verdicts(figures, figures) == dict.fromkeys(figures, "same")
    assert verdicts(figures, figures, tolerance=0) == dict.fromkeys(figures, "same")


def test_less_is_better_of_nats_and_more_of_shares() -> None:
    shares = items(0.9, 0.8, 0.85, 0.95, 0.9, 0.7)
    figures = {"kl_nats": KL, "nll_nats": plus(KL, 3.5), "top1_agreement": shares, "task": shares}
    up = {name: plus(each, 0.04, 0.05) for name, each in figures.items()}
    assert verdicts(figures, up) == {
        "kl_nats": "worse", "nll_nats": "worse", "top1_agreement": "better", "task": "better"
    }  # fmt: skip
    assert verdicts(up, figures) == {
        "kl_nats": "better", "nll_nats": "better", "top1_agreement": "worse", "task": "worse"
    }  # fmt: skip


def test_a_sure_change_within_the_tolerance_is_none() -> None:
    """KL is 0.0238 on average, so that 5 % are 0.00119: 0.001 more at every sequence is less, at 4 % tolerance more."""
    more = plus(KL, 0.00098, 0.00102)
    (change,) = changes({"kl_nats": KL}, {"kl_nats": more}).values()
    assert change.p_worse < 1e-6 and change.verdict == "same"
    assert change.tolerated == pytest.approx(0.05 * KL.mean)
    assert verdicts({"kl_nats": KL}, {"kl_nats": more}, tolerance=0.04) == {"kl_nats": "worse"}


def test_shares_are_tolerated_to_lack_a_share_of_what_they_lack() -> None:
    right = items(1, 1, 0, 1, 1, 0, 1, 1)  # a quarter wrong
    found = changes({"kl_nats": items(*[0.02] * 8), "task": right}, {"kl_nats": items(*[0.02] * 8), "task": right})
    assert found["task"].tolerated == pytest.approx(0.05 / 4)


def test_what_scatters_is_unclear_rather_than_worse() -> None:
    more = plus(KL, 0.02, -0.015, 0.001, -0.004)
    assert verdicts({"kl_nats": KL}, {"kl_nats": more}) == {"kl_nats": "unclear"}
    assert verdicts({"kl_nats": items(0.02)}, {"kl_nats": items(0.04)}) == {"kl_nats": "unclear"}  # one sequence


def test_what_is_no_number_is_worse() -> None:
    for value in (math.nan, math.inf):
        assert verdicts({"kl_nats": KL}, {"kl_nats": plus(KL, 0, 0, 0, value)}) == {"kl_nats": "worse"}


def test_false_alarms_are_as_rare_as_promised_over_all_figures() -> None:
    """Four figures that do not change but scatter, 600 times: 5 % alarms at most, plus three standard errors."""
    source = random.Random(0)
    names = "kl_nats", "top1_agreement", "top5_agreement", "nll_nats"
    baseline = {name: items(*[0.5] * 8) for name in names}
    alarms = 0
    for _ in range(600):
        found = {name: items(*(0.5 + source.gauss(0, 0.1) for _ in range(8))) for name in names}
        alarms += "worse" in verdicts(baseline, found, tolerance=0).values()
    assert 0.01 < alarms / 600 < LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 600)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("plans")
    return {bits: save_plan(folder / f"{bits}.plan", f"group(bits={bits}, size=128)") for bits in (3, 4)}


EVALUATE = "evaluate", MODEL, "--plan"
SHORT = "--num-samples", 6, "--max-seq-len", 48, "--dtype", "float32"


def test_a_plan_passes_against_itself_and_one_of_fewer_bits_fails(plans: dict[int, Path], tmp_path: Path) -> None:
    baseline, report = tmp_path / "baseline.json", tmp_path / "report.json"
    four, three = ((*EVALUATE, plans[bits], *SHORT) for bits in (4, 3))
    assert "no such file. Write one with evaluate --json, or, " in refused(*four, "--baseline", baseline)
    run(*four, "--json", baseline)
    before = baseline.read_bytes()
    shown = run(*four, "--baseline", baseline)
    assert shown.count("same") == 4 and "worse" not in shown and "…" not in shown
    shown = run(*three, "--baseline", baseline, "--json", report, status=1)
    assert "worse" in shown and "…" not in shown
    found = json.loads(report.read_text(encoding="utf8"))["changes"]
    assert found["kl_nats"]["verdict"] == "worse"
    assert found["kl_nats"]["change"] > found["kl_nats"]["tolerated"] > 0
    assert baseline.read_bytes() == before
    assert "better" in run(*four, "--baseline", report)  # one that is worse, if that is what the user wants


def test_what_cannot_be_compared_is_refused(plans: dict[int, Path], tmp_path: Path) -> None:
    baseline, text = tmp_path / "baseline.json", tmp_path / "other.txt"
    run(*EVALUATE, plans[4], *SHORT, "--json", baseline)
    gate = *EVALUATE, plans[4], "--baseline", baseline
    text.write_text("Quite another text. " * 100)
    assert "num_samples 5, found 6" in refused(*gate, "--num-samples", 5, "--max-seq-len", 48)
    assert "max_seq_len 40, found 48" in refused(*gate, "--num-samples", 6, "--max-seq-len", 40)
    assert "algorithm two_shot, found auto" in refused(*gate, *SHORT, "--algorithm", "two_shot")
    assert "text_sha256" in refused(*gate, *SHORT, "--text", text)
    text.write_text("Too little.")
    assert "two sequences or more, found 1" in refused(*gate, *SHORT, "--text", text)
    assert "a file for each" in refused(*gate, *SHORT, "--json", baseline)
    stored = json.loads(baseline.read_text(encoding="utf8"))
    for change, why in (
        ({"model_fingerprint": "0" * 64}, "model_fingerprint"),
        ({"tp_size": 4}, "tp_size 2, found 4"),
        ({"reference": "split"}, "reference whole, found split"),
        ({"by_sequence": 1}, "figures by sequence"),
        ({"by_sequence": {"kl_nats": {"values": [1.0], "weights": []}}}, "figures by sequence"),
        (
            {"by_sequence": stored["by_sequence"] | {"arc": {"values": [1], "weights": [1]}}},
            "arc as scored, found none",
        ),
    ):
        baseline.write_text(json.dumps(stored | change))
        assert why in refused(*gate, *SHORT)


def test_a_baseline_is_an_earlier_report(plans: dict[int, Path], tmp_path: Path) -> None:
    precious = tmp_path / "precious.json"
    precious.write_text('{"mine": 1}')
    command = *EVALUATE, plans[4], *SHORT
    assert "an earlier report, found another file" in refused(*command, "--baseline", precious)
    assert "an earlier report, found another file" in refused(*command, "--json", precious)
    assert precious.read_text() == '{"mine": 1}'
