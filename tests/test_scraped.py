"""A real Prometheus scrapes a model at work, and raises an alert when a site is driven out of its calibrated range."""

import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import start_http_server

from conftest import MODEL
from narrowcast import calibrate
from narrowcast.calibration.text import sequences
from narrowcast.engines import load_engine
from narrowcast.monitoring.export import RULES, export
from watched import watched

SITE = "model.layers.4.mlp.down_proj"
LIMIT_S = 60
RATED = "query?query=rate(narrowcast_tokens_total[10m])"  # there is something after two scrapes


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """The address of a Prometheus that scrapes every second, and waits for no alert to last."""
    export(folder)
    rules = folder / RULES
    rules.write_text(re.sub("for: .*", "for: 0s", rules.read_text()))
    scraped = {"job_name": "narrowcast", "static_configs": [{"targets": [target]}]}
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config = {"global": every, "rule_files": [RULES], "scrape_configs": [scraped]}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    process = subprocess.Popen(
        [*command, "--web.listen-address=127.0.0.1:0"], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    try:
        yield f"http://{address_of(process)}"
    finally:
        process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> str:
    """Where it listens, once it answers."""
    address = ""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r'"Listening on" address=(\S+)', line):
            address = found[1]
        if "Server is ready" in line:
            return address
    raise AssertionError("Prometheus has ended")


def asked(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/v1/{path}", timeout=LIMIT_S) as answer:
        return json.load(answer)["data"]


def firing(url: str) -> set[tuple[str, str]]:
    """Names of alerts, and their sites."""
    alerts = [each["labels"] for each in asked(url, "alerts")["alerts"] if each["state"] == "firing"]
    return {(each["alertname"], each.get("site", "")) for each in alerts}


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (apt install prometheus)")
def test_a_site_out_of_its_range_raises_an_alert(tmp_path: Path) -> None:
    engine = load_engine()
    model, tokenizer = engine.load(MODEL, dtype="float32"), engine.load_tokenizer(MODEL)
    calibrating, scoring = (
        sequences(tokenizer, MODEL / f"{name}.txt", length=128, limit=24) for name in ("calibration", "scoring")
    )
    plan, times = calibrate(model, calibrating, tp_size=2, codec="int4-feature"), [1.0]
    model.get_submodule(SITE).register_forward_pre_hook(lambda module, given: (given[0] * times[0],))
    with watched(model, plan) as server:
        text = itertools.cycle(ids[:, :32] for ids in scoring)

        def serve_until(so: Callable[[], object]) -> None:
            deadline = time.monotonic() + LIMIT_S
            while not so():
                assert time.monotonic() < deadline, firing(url)
                server.read(next(text))

        exporter, thread = start_http_server(0, "127.0.0.1", server.registry)
        try:
            with prometheus(tmp_path, f"127.0.0.1:{exporter.server_port}") as url:
                serve_until(lambda: asked(url, RATED)["result"])
                assert firing(url) == set()
                times[0] = 50.0
                serve_until(lambda: ("NarrowcastGuardStorm", SITE) in firing(url))
                exporter.shutdown()
                exporter.server_close()
                serve_until(lambda: ("NarrowcastServerDown", "") in firing(url))
        finally:
            exporter.shutdown()
            exporter.server_close()
            thread.join()
