"""A real Prometheus scrapes real servers, and raises an alert where a site is out of its calibrated range."""

import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file

from conftest import MODEL
from narrowcast import calibrate
from narrowcast.calibration.text import sequences
from narrowcast.engines import load_engine
from narrowcast.monitoring.export import RULES, export
from servers import Server

SITE = "model.layers.4.mlp.down_proj"
NAME = "m"
LIMIT_S = 60
RATED = "query?query=rate(narrowcast_tokens_total[10m])"  # there is something after two scrapes


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """The address of a Prometheus that scrapes every second, and waits for no alert to last."""
    export(folder)
    rules = folder / RULES
    rules.write_text(re.sub("for: .*", "for: 0s", rules.read_text()))
    scraped = {"job_name": "narrowcast", "static_configs": [{"targets": targets}]}
    every = {"scrape_interval": "1s", "evaluation_interval": "250ms"}
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


def firing(url: str) -> set[tuple[str, str, str]]:
    """Names of alerts, their sites and servers."""
    alerts = [each["labels"] for each in asked(url, "alerts")["alerts"] if each["state"] == "firing"]
    return {(each["alertname"], each.get("site", ""), each["instance"]) for each in alerts}


def drifted(folder: Path) -> Path:
    """The bundled model with one MLP whose values are 50 times as large: by its name, config and samples the same."""
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights[SITE.replace("down_proj", "up_proj") + ".weight"] *= 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (apt install prometheus)")
def test_a_server_whose_model_has_drifted_raises_an_alert(tmp_path: Path) -> None:
    """Beside it, one whose model is the plan's raises none; and when the first one ends, there is an alert of that."""
    model, tokenizer = load_engine().load(MODEL), load_engine().load_tokenizer(MODEL)
    text = sequences(tokenizer, MODEL / "calibration.txt", length=128, limit=24)
    calibrate(model, text, tp_size=2, codec="int4-feature").save(tmp_path / "plan")
    asked_of = (MODEL / "scoring.txt").read_text(encoding="utf8")[:2000]
    prompts = itertools.cycle(asked_of[start : start + 200] for start in range(0, 2000, 200))
    options = "--plan", tmp_path / "plan", "--sample-every", 1, "--name", NAME
    with ExitStack() as stack, Server(MODEL, *options) as server:
        other = stack.enter_context(Server(drifted(tmp_path / "drifted"), *options))
        (tmp_path / "prometheus").mkdir()
        with (
            prometheus(tmp_path / "prometheus", [server.address, other.address]) as url,
            server.client() as client,
            other.client() as other_client,
        ):

            def serve_until(so: Callable[[], object], *clients: OpenAI) -> None:
                deadline = time.monotonic() + LIMIT_S
                while not so():
                    assert time.monotonic() < deadline, firing(url)
                    for each in clients:
                        each.completions.create(model=NAME, prompt=next(prompts), max_tokens=2)

            guarded = "NarrowcastGuardStorm", SITE, other.address
            serve_until(lambda: guarded in firing(url), client, other_client)
            assert {address for _, _, address in firing(url)} == {other.address}
            serve_until(lambda: len(asked(url, RATED)["result"]) == 4, client, other_client)  # two ranks of each
            stack.close()
            serve_until(lambda: ("NarrowcastServerDown", "", other.address) in firing(url), client)
            assert {address for _, _, address in firing(url)} == {other.address}
