"""Figures of vLLM's ranks at its own /metrics, beside its own; with a port, each rank tells its own, too."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from narrowcast.plan import Plan
from running import Server, ask, free_port, serving

EVERY_S = 5  # ranks tell what is new
SAMPLES = "20"


class Figures:
    """Samples of a page of metrics."""

    def __init__(self, url: str) -> None:
        families = list(text_string_to_metric_families(ask(f"{url}/metrics")))
        self._samples = [sample for family in families for sample in family.samples]

    def of(self, name: str, **labels: str) -> list[float]:
        """The values of one name whose labels are these, whatever others."""
        return [each.value for each in self._samples if each.name == name and labels.items() <= each.labels.items()]

    @property
    def names(self) -> set[str]:
        return {each.name for each in self._samples}


def reports(server: Server) -> list[dict[str, Any]]:
    """What the ranks themselves say."""
    found: list[dict[str, Any]] = json.loads(ask(f"{server.url}/collective_rpc", method="narrowcast_report"))["results"]
    return found


def up_to_date(server: Server) -> Figures:
    """The figures, once they are those of all ranks now."""
    deadline = time.monotonic() + 4 * EVERY_S
    now = [float(each["num_tokens"]) for each in reports(server)]
    while (found := Figures(server.url)).of("narrowcast_tokens_total") != now:
        assert time.monotonic() < deadline, found.of("narrowcast_tokens_total")
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("options", [(), ("--api-server-count", "2")])
def test_all_ranks_are_at_the_servers_metrics(folder: Path, options: tuple[str, ...]) -> None:
    plan, port = Plan.load(folder / "int4.plan"), free_port()
    environment = {"NARROWCAST_PLAN": str(folder / "int4.plan"), "NARROWCAST_SAMPLE_EVERY": SAMPLES}
    environment |= {"NARROWCAST_METRICS_PORT": str(port), "VLLM_SERVER_DEV_MODE": "1"}  # for reports
    with serving(folder, *options, **environment) as server:
        before = up_to_date(server)
        assert before.of("narrowcast_tokens_total") == [0, 0], "nothing but requests counts"
        assert before.of("narrowcast_ranks") == [2]
        assert before.of("narrowcast_info", plan=plan.fingerprint[:12], transport="tcp") == [1, 1]
        prompts = "It was a dark and stormy night", "The king said to the queen"
        sent = []
        for prompt in prompts:
            assert server.complete(prompt, 100)[0] == 200
            found = up_to_date(server)
            for rank, report in enumerate(reports(server)):
                counted = sum(site["wire_bytes"] for site in report["sites"].values())
                assert sum(found.of("narrowcast_sent_bytes_total", rank=str(rank))) == counted
                assert Figures(f"http://127.0.0.1:{port + rank}").of("narrowcast_tokens_total") == [
                    report["num_tokens"]
                ]
            sent.append(sum(found.of("narrowcast_sent_bytes_total")))
        assert 0 < sent[0] < sent[1]
        assert sum(found.of("vllm:generation_tokens_total")) == 200, "vLLM's own figures"
        for rank in ("0", "1"):
            for site in plan.sites:
                (times,) = found.of("narrowcast_site_sampled_sums_total", rank=rank, site=site)
                assert times == pytest.approx(200 / int(SAMPLES), abs=1)
            squares = [sum(found.of(f"narrowcast_site_{of}_squares_total", rank=rank)) for of in ("error", "sum")]
            assert 0.01 < math.sqrt(squares[0] / squares[1]) < 0.2
            (times,), (ratios,) = (
                found.of(f"narrowcast_relative_error_ratio_{part}", rank=rank) for part in ("count", "sum")
            )
            assert 0.5 < ratios / times < 2, "errors are about what the plan expects"
        assert server.process.poll() is None


def test_without_a_variable_they_are_vllms_own(folder: Path) -> None:
    with serving(folder) as server:
        assert server.complete("It was", 8)[0] == 200
        names = Figures(server.url).names
    assert any(name.startswith("vllm:") for name in names)
    assert not any(name.startswith("narrowcast") for name in names)
