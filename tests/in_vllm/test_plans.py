"""Plans that vLLM's ranks make themselves, of live traffic, and tune where they serve."""

import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from narrowcast.plan import Plan
from narrowcast.plan.decisions import Choice, Decisions
from running import EMBEDDING, MODEL, ROUNDING, Run, differences, run, simulated, started

EAGER = {"model": MODEL, "eager": True, "served": True}


@pytest.fixture(scope="module")
def calibrating(folder: Path) -> Run:
    """Compiled."""
    asked = {"model": MODEL, "eager": False, "served": True, "awaits": str(folder / "live.plan"), "awaits_s": 60}
    found = {"NARROWCAST_CALIBRATE": str(folder / "live.plan"), "NARROWCAST_CALIBRATE_TOKENS": "48"}
    return run(folder, "calibrating", asked, **found)


def test_while_it_calibrates_sums_are_exact(calibrating: Run, folder: Path) -> None:
    plan = Plan.load(folder / "live.plan")
    assert plan.calibration["num_tokens"] == 48 and plan.tp_size == 2 and len(plan.sites) == 16
    assert max(differences(calibrating.scores, simulated(calibrating, folder, "live.plan")["exact"])) < ROUNDING
    assert f"plan {plan.fingerprint[:12]} written to {folder / 'live.plan'}" in calibrating.log
    assert "it lacks depth feedback" in calibrating.log


def test_both_engines_serve_the_plan(calibrating: Run, folder: Path) -> None:
    served = run(folder, "live", EAGER, NARROWCAST_PLAN=str(folder / "live.plan"))
    expected, sites = simulated(served, folder, "live.plan"), served.answers["reports"][0]["sites"]
    assert {name for name, site in sites.items() if site["coded"]} == set(sites) - {EMBEDDING}
    assert "depth feedback at 0 of 16 sums\n" in served.log
    assert "none at 0.mlp.down_proj and 15 more: live traffic" in served.log
    assert "not tuned: all sums are coded" in served.log
    apart, costs = differences(served.scores, expected["planned"]), differences(served.scores, expected["exact"])
    assert sum(apart) < sum(costs) / 4
    assert ROUNDING < statistics.mean(costs) < 0.3


def test_what_was_tuned_elsewhere_decides(calibrating: Run, folder: Path) -> None:
    """As `narrowcast tune` leaves it in the plan: here, that no sum is worth coding."""
    plan, native = Plan.load(folder / "live.plan"), ((1, Choice("native")),)
    num_features = plan.model.config["hidden_size"]
    replace(plan, decisions=Decisions(coded={num_features: native})).save(folder / "tuned.plan")
    served = run(folder, "tuned", EAGER, NARROWCAST_PLAN=str(folder / "tuned.plan"))
    assert "tuned: sums of 1 token native, sums of 512 tokens native" in served.log
    assert max(differences(served.scores, calibrating.scores)) < ROUNDING
    assert served.answers["tokens"] == calibrating.answers["tokens"]


def test_ranks_tune_at_the_start(calibrating: Run, folder: Path) -> None:
    """Whatever they find fastest: each way is about as good as coding."""
    served = run(folder, "tuning", EAGER, NARROWCAST_PLAN=str(folder / "live.plan"), NARROWCAST_TUNE="1")
    assert re.search(r"tuned: sums of 1 token \w+.*, sums of 512 tokens \w+", served.log)
    assert statistics.mean(differences(served.scores[:40], calibrating.scores[:40])) < 0.3


def test_a_file_that_exists_is_not_calibrated_over(folder: Path) -> None:
    path = folder / "int4.plan"
    before = path.read_bytes()
    code, found = started(folder, "over", EAGER, {"NARROWCAST_CALIBRATE": str(path)})
    assert code != 0 and f"expected a file that is not there yet, found {path}. Name another" in found.log
    assert path.read_bytes() == before
