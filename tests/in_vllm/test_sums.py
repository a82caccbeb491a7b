"""vLLM on two ranks sends what a plan says, as the simulation has it: bits, bytes, answers; eager and compiled."""

import statistics
from pathlib import Path

import pytest

from narrowcast.plan import Plan
from narrowcast.runtime.reports import Report
from running import EMBEDDING, MODEL, ROUNDING, Run, differences, run, share_alike, simulated
from sums import as_simulated


@pytest.fixture(scope="module")
def plain(folder: Path) -> Run:
    """Without the plug-in's variables, compiled: it fills the cache of compiled graphs."""
    return run(folder, "plain", {"model": MODEL, "eager": False, "served": False})


@pytest.fixture(scope="module")
def compiled(folder: Path, plain: Run) -> Run:
    asked = {"model": MODEL, "eager": False, "served": True, "record": True}
    return run(folder, "compiled", asked, NARROWCAST_PLAN=str(folder / "int4.plan"), NARROWCAST_SAMPLE_EVERY="0")


@pytest.fixture(scope="module")
def eager(folder: Path) -> Run:
    asked = {"model": MODEL, "eager": True, "served": True, "record": True}
    settings = {"plan": str(folder / "int4.plan"), "sample_every": 0}
    return run(folder, "eager", asked | {"additional_config": {"narrowcast": settings}})


@pytest.fixture(scope="module", params=["eager", "compiled"])
def served(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found


def test_every_sum_travels_and_comes_out_as_simulated(served: Run, folder: Path) -> None:
    """The same bits on both ranks, of what they put in; feedback begins anew with every forward; the same bytes."""
    plan = Plan.load(folder / "int4.plan")
    first, simulator = as_simulated(served, plan)
    assert {site for site, *_ in first} == {EMBEDDING, *plan.sites}
    assert {len(given) for _, given, _ in first} >= {1, 3, 32}, "a decoded token, three at once, a chunk of a prompt"
    reports = [Report.from_json(each) for each in served.answers["reports"]]
    counted = {name: site.counting([each.sites[name] for each in reports]) for name, site in reports[0].sites.items()}
    assert counted == simulator.sites.report().sites
    assert reports[0].bits_per_value == pytest.approx((15 * 4.1875 + 8.25) / 16)


def test_answers_are_those_of_the_simulation(served: Run, folder: Path) -> None:
    """Far closer than to what the model says uncompressed, or to what it would say without feedback."""
    expected = simulated(served, folder)
    apart, *others = (differences(served.scores, expected[name]) for name in ("planned", "exact", "without feedback"))
    assert share_alike(apart) > 0.25
    for other in others:
        assert statistics.mean(apart) < statistics.mean(other) / 4
        assert share_alike(other) < 0.05


def test_compiled_and_eager_answer_alike(eager: Run, compiled: Run) -> None:
    assert eager.answers["tokens"] == compiled.answers["tokens"]
    assert share_alike(differences(eager.scores, compiled.scores)) > 0.25


OURS = "sums, over tcp"  # in the log


def test_without_a_variable_vllm_is_as_it_was(plain: Run, compiled: Run, folder: Path) -> None:
    """Whatever stands in the cache of compiled graphs: after a run with a plan, too."""
    again = run(folder, "again", {"model": MODEL, "eager": False, "served": False})
    for each in (plain, again):
        expected = simulated(each, folder)["exact"]
        assert max(differences(each.scores, expected)) < ROUNDING
        assert OURS not in each.log
    assert OURS in compiled.log
    assert max(differences(plain.scores, compiled.scores)) > 100 * ROUNDING


def test_a_codec_needs_no_plan(folder: Path) -> None:
    found = run(folder, "codec", {"model": MODEL, "eager": True, "served": True}, NARROWCAST_CODEC="int8-group128")
    sites = found.answers["reports"][0]["sites"]
    coded = [name for name, site in sites.items() if site["coded"]]
    assert len(coded) == 16 and set(sites) == {EMBEDDING, *coded}
    assert found.answers["reports"][0]["bits_per_value"] == 8.25
    assert "codec int8-group128 at 16 sums, over tcp" in found.log
    apart = differences(found.scores, simulated(found, folder)["exact"])
    assert ROUNDING < statistics.mean(apart) < 0.03
