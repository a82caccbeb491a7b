"""Alerts: what raises them, what they say, and what raises none; by Prometheus's own promtool."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import refused, run
from narrowcast.monitoring.alerts import Alert, alerts
from narrowcast.monitoring.export import DASHBOARD, RULES, export

PAGE = Path(__file__).parents[1] / "docs" / "monitoring.md"
SITES = "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"
SITE = SITES[1]
SERVER = {"job": "narrowcast", "instance": "a:8000"}
TTFT = "vllm:time_to_first_token_seconds"
DAY = 360  # scrapes until something happens, one in five minutes, where the day before matters

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt install prometheus)")


def series(name: str, **labels: str) -> str:
    selected = ",".join(f'{label}="{value}"' for label, value in (SERVER | labels).items())
    return f"{name}{{{selected}}}"


def steady(length: int, until: int | None = None) -> dict[str, str]:
    """So many scrapes of a server of two ranks in order; one that is not there any more after `until` scrapes."""
    last = length if until is None else until
    found = {series("up"): f"1x{last} 0x{length - last}", series("narrowcast_ranks"): f"2x{last} stale"}
    found[series(f"{TTFT}_sum", model_name="m")] = f"0+2x{last} stale"
    found[series(f"{TTFT}_count", model_name="m")] = f"0+20x{last} stale"
    for rank in "01":
        about = {"version": "1", "plan": "p", "transport": "tcp", "kernels": "avx2", "rank": rank}
        found[series("narrowcast_info", **about)] = f"1x{last} stale"
        found[series("narrowcast_tokens_total", rank=rank)] = f"0+600x{last} stale"
        found[series("narrowcast_planned_bytes_per_value", rank=rank)] = f"0.555x{last} stale"
        for codec, each in (("feature", 555), ("none", 2000)):
            labels = {"rank": rank, "kind": "sum", "codec": codec, "hop": "partial"}
            found[series("narrowcast_sent_bytes_total", **labels)] = f"0+{each}x{last} stale"
            found[series("narrowcast_sent_values_total", **labels)] = f"0+1000x{last} stale"
        for site in SITES:
            rates = {"sent_values": 1000, "clipped_values": 10, "non_finite_values": 0, "guarded_tokens": 1}
            rates |= {"sampled_sums": 2, "sampled_non_finite": 0}
            rates |= {"error_squares": 2.25, "expected_error_squares": 2.25, "sum_squares": 100}
            for name, rate in rates.items():
                found[at(name, rank, site)] = f"0+{rate}x{last} stale"
    return found


def at(name: str, rank: str, site: str = SITE) -> str:
    return series(f"narrowcast_site_{name}_total", rank=rank, site=site)


def on_ranks(name: str, values: str, site: str = SITE) -> dict[str, str]:
    return {at(name, rank, site): values for rank in "01"}


def sent(num_bytes: str) -> dict[str, str]:
    labels = {"kind": "sum", "codec": "feature", "hop": "partial"}
    return {series("narrowcast_sent_bytes_total", rank=rank, **labels): num_bytes for rank in "01"}


WRONG: dict[str, tuple[int, Mapping[str, str], str, dict[str, str], str]] = {
    "the server is gone": (
        *(23, steady(30, until=20)),
        *("NarrowcastServerDown", {}, "a:8000 does not answer: nobody is served there"),
    ),
    "a rank is gone": (
        22,
        {
            series("narrowcast_info", rank="1", version="1", plan="p", transport="tcp", kernels="avx2"): "1x20 stale",
        },
        *("NarrowcastRankGone", {}, "a:8000 hears of 1 ranks only: one is lost, requests hang or fail"),
    ),
    "a value is not finite": (
        *(21, {at("non_finite_values", "1"): "0x20 1x10"}, "NarrowcastNonFinite", {"site": SITE}),
        f"NaN or infinite values at {SITE} on a:8000: answers are broken",
    ),
    "the first value ever is not finite": (
        *(21, {at("non_finite_values", "1"): "_x20 1x10"}, "NarrowcastNonFinite", {"site": SITE}),
        f"NaN or infinite values at {SITE} on a:8000: answers are broken",
    ),
    "a sampled sum is not finite": (
        *(21, on_ranks("sampled_non_finite", "0x20 1x10"), "NarrowcastNonFinite", {"site": SITE}),
        f"NaN or infinite values at {SITE} on a:8000: answers are broken",
    ),
    "a site loses more than it should": (
        *(60, on_ranks("error_squares", "0+14.0625x60"), "NarrowcastErrorAbovePlan", {"site": SITE}),
        f"{SITE} on a:8000 loses 2.5 times what the plan expects: answers get worse",
    ),
    "values are clipped": (
        *(40, on_ranks("clipped_values", "0+200x60"), "NarrowcastSaturated", {"site": SITE}),
        f"20% of the values at {SITE} on a:8000 are clipped: they are larger than the plan has seen",
    ),
    "tokens are guarded": (
        *(40, on_ranks("guarded_tokens", "0+120x60"), "NarrowcastGuardStorm", {"site": SITE}),
        f"20% of the tokens at {SITE} on a:8000 are far out of the plan's range and coded coarsely",
    ),
    "values take more bits": (
        *(40, sent("0+600x60"), "NarrowcastBitsAbovePlan", {}),
        "a:8000 sends 4.80 bits a value, more than its plan says",
    ),
    "first tokens are late": (
        *(40, {series(f"{TTFT}_sum", model_name="m"): "0+8x60"}, "NarrowcastSlowFirstTokens", {"model_name": "m"}),
        "first tokens on a:8000 take 400ms on average, 0.1 s when the baseline was recorded",
    ),
    "errors are larger for hours": (
        *(400, on_ranks("error_squares", "0+7.29x400"), "NarrowcastRangesDrift", {"site": SITE}),
        f"what {SITE} on a:8000 sends has moved away from what the plan was calibrated on: calibrate again",
    ),
    "more is clipped than the day before": (
        *(DAY, on_ranks("clipped_values", f"0+10x260 2610+40x{DAY - 260}"), "NarrowcastRangesDrift", {"site": SITE}),
        f"what {SITE} on a:8000 sends has moved away from what the plan was calibrated on: calibrate again",
    ),
}
RIGHT: dict[str, tuple[int, Mapping[str, str]]] = {
    "all is as planned": (DAY, {}),
    "nobody asks for anything": (
        60,
        {name: re.sub(r"^0\+[\d.]+x", "0x", values) for name, values in steady(60).items()},
    ),
    "the server was started again": (
        40,
        {name: re.sub(r"^(0\+[\d.]+)x60", r"\1x34 \1x25", values) for name, values in steady(60).items()},
    ),
    "a failed scrape": (22, {series("up"): "1x20 0 1x20"}),
    "an error that nobody notices, of a plan that expects none": (
        60,
        on_ranks("error_squares", "0+1x60") | on_ranks("expected_error_squares", "0+0.01x60"),
    ),
    "a value was not finite long ago": (40, {at("non_finite_values", "1"): "0x20 1x40"}),
    "few sums were sampled": (60, on_ranks("error_squares", "0x50 1400x10") | on_ranks("sampled_sums", "0x50 4x10")),
    "a few late first tokens": (
        40,
        {series(f"{TTFT}_{part}", model_name="m"): "0+0.5x60" for part in ("sum", "count")},
    ),
    "few values are clipped, and were fewer": (DAY, on_ranks("clipped_values", f"0+1x260 261+4x{DAY - 260}")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("exported")
    export(found, ttft_s=0.1, overwrite=False)
    return found


def judged(
    folder: Path, scrape: int, changes: Mapping[str, str], expected: Mapping[str, list[dict[str, object]]]
) -> str:
    """The complaints of promtool if other alerts than those fire at that scrape."""
    every = 5 if scrape == DAY else 1
    tests = [
        {"eval_time": f"{scrape * every}m", "alertname": name, "exp_alerts": each} for name, each in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in (steady(max(scrape, 60)) | changes).items()]
    given = {"interval": f"{every}m", "input_series": inputs, "alert_rule_test": tests}
    path = folder / f"{len(list(folder.iterdir()))}.test.yml"  # JSON is YAML, too
    path.write_text(json.dumps({"rule_files": [RULES], "evaluation_interval": f"{every}m", "tests": [given]}))
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr if done.returncode else ""


def none_but(**fired: list[dict[str, object]]) -> dict[str, list[dict[str, object]]]:
    return {rule.name: fired.get(rule.name, []) for rule in alerts(ttft_s=0.1)}


@needs_promtool
@pytest.mark.parametrize("what", WRONG)
def test_one_alert_says_what_is_wrong_and_where_to_read_on(folder: Path, what: str) -> None:
    scrape, changes, name, labels, summary = WRONG[what]
    (rule,) = (rule for rule in alerts(ttft_s=0.1) if rule.name == name)
    runbook = f"docs/monitoring.md#{name.lower()}"
    fired: dict[str, object] = {
        "exp_labels": {**SERVER, **labels, "severity": rule.severity},
        "exp_annotations": {"summary": summary, "runbook_url": runbook},
    }
    assert judged(folder, scrape, changes, none_but(**{name: [fired]})) == ""


@needs_promtool
@pytest.mark.parametrize("what", RIGHT)
def test_nobody_is_called_where_nothing_is_wrong(folder: Path, what: str) -> None:
    scrape, changes = RIGHT[what]
    assert judged(folder, scrape, changes, none_but()) == ""


@needs_promtool
def test_rules_are_sound(folder: Path) -> None:
    done = subprocess.run(["promtool", "check", "rules", folder / RULES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "SUCCESS: 9 rules found" in done.stdout, done.stdout + done.stderr


def test_each_alert_was_seen_to_fire() -> None:
    assert {name for _, _, name, _, _ in WRONG.values()} == {rule.name for rule in alerts(ttft_s=0.1)}


@pytest.mark.parametrize("rule", alerts(ttft_s=1.0), ids=lambda rule: rule.name)
def test_each_alert_has_a_heading_that_says_what_to_do(rule: Alert) -> None:
    headings = re.findall(r"^### (\w+)$", PAGE.read_text(encoding="utf8"), re.MULTILINE)
    assert rule.name in headings


def test_first_tokens_are_compared_with_a_baseline_alone() -> None:
    names = [rule.name for rule in alerts()]
    assert [rule.name for rule in alerts(ttft_s=1.0) if rule.name not in names] == ["NarrowcastSlowFirstTokens"]


def test_exporting_says_what_it_wrote_and_replaces_only_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    export = "monitor", "export", folder
    said = run(*export, "--error-factor", 3, "--runbook", "https://x/y.md")
    assert said.splitlines() == [str(folder / RULES), str(folder / DASHBOARD)]
    rules = (folder / RULES).read_text()
    assert "> 3\n" in rules and "> 2.625\n" in rules, "errors, and for hours"
    assert '"value": 2.625' in (folder / DASHBOARD).read_text()
    assert 'runbook_url: "https://x/y.md#narrowcastnonfinite"' in rules
    assert "a file that exists" in refused(*export)
    assert (folder / RULES).read_text() == rules
    run(*export, "--overwrite")
    assert "> 2\n" in (folder / RULES).read_text()
    (folder / DASHBOARD).write_text("{}")
    assert "expected a new file or an earlier export, found another file" in refused(*export, "--overwrite")
    assert (folder / DASHBOARD).read_text() == "{}"


def test_wrong_folders_and_numbers_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no " in refused("monitor", "export", tmp_path / "none" / "new")
    assert "expected a folder" in refused("monitor", "export", tmp_path / "file")
    for option in ("--ttft", "--error-factor"):
        for number in ("0", "nan", "inf"):
            assert "expected a number above 0" in refused("monitor", "export", tmp_path / "new", option, number)
    assert not (tmp_path / "new").exists()
