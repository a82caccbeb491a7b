"""The dashboard, and the names of metrics that it, the alerts, and the live view ask for."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models import random_ids, save_random
from narrowcast import calibrate
from narrowcast.engines import load_engine
from narrowcast.monitoring.alerts import alerts
from narrowcast.monitoring.dashboard import GRID, dashboard
from narrowcast.monitoring.figures import Figures, Window
from narrowcast.monitoring.scrape import Scrape
from watched import OF_VLLM, watched

BOARD = dashboard("docs/monitoring.md")
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of what is scraped of a model at work."""
    model = load_engine().load(save_random("llama", tmp_path_factory.mktemp("model")))
    plan = calibrate(model, [random_ids(2, 16)], tp_size=2, codec="int4-feature")
    with watched(model, plan) as server:
        server.read(random_ids(1, 8))
        families = text_string_to_metric_families(server.text())
        return {sample.name for family in families for sample in family.samples}


class Empty(dict[str, Any]):
    """Series of nothing, which keep the names that were asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return default


def test_every_name_that_is_asked_for_is_exported(exported: set[str]) -> None:
    asked = "\n".join([*queries(), *(rule.expression for rule in alerts(ttft_s=1.0))])
    names = set(re.findall(r"\b(?:narrowcast_\w+|vllm:\w+)", asked))
    series = Empty()
    Figures.of(Window(Scrape(series)), Window(Scrape(series)))
    names |= series.asked
    assert len(names) > 30 and len(series.asked) > 20
    assert names - exported - OF_VLLM == set()


def test_all_that_is_exported_is_shown(exported: set[str]) -> None:
    """But what is there in another form: tokens of ranks, totals since the start, errors over the plan's."""
    shown = "\n".join(queries())
    ours = {re.sub("_(bucket|count|sum)$", "", name) for name in exported if name.startswith("narrowcast_")}
    assert {name for name in ours if name not in shown} == {
        "narrowcast_ranks",
        "narrowcast_compression_ratio",
        "narrowcast_site_relative_error",
        "narrowcast_site_sum_squares_total",
        "narrowcast_site_sent_bytes_total",
        "narrowcast_site_sampled_sums_total",
        "narrowcast_site_sampled_non_finite_total",
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt install prometheus)")
def test_prometheus_understands_every_question(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "1m").replace("$__range", "1h")}
        for number, query in enumerate(queries())
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    command = ["promtool", "check", "rules", tmp_path / "rules.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_have_numbers_and_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID
        area = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & area, panel["title"]
        taken |= area
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert all(panel["description"] and panel["targets"] for panel in PANELS)


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Places of what is not the same in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{where}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (mine, theirs) in enumerate(zip(given, kept, strict=True)):
            yield from lost(mine, theirs, f"{where}[{number}]")
    elif given != kept:
        yield where


def as_grafana_knows_it(board: dict[str, Any]) -> Any:
    """Read and written by Grafana's own types, which drop what they do not know."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs grafana-foundation-sdk, of the extra dev")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))


def test_grafana_knows_all_of_it() -> None:
    assert list(lost(BOARD, as_grafana_knows_it(BOARD))) == []


def test_what_grafana_does_not_know_would_be_found() -> None:
    board = json.loads(json.dumps(BOARD))
    (heat,) = (panel for panel in board["panels"] if panel["type"] == "status-history")
    heat["options"]["showValues"] = "never"
    (where,) = lost(board, as_grafana_knows_it(board))
    assert where.endswith(".options.showValues")
