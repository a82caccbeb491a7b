"""The live view: figures of a server at one moment, in 80 columns, and what it says where there are none."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from commands import refused, run
from models import random_ids, save_random
from narrowcast import calibrate
from narrowcast.cli.top import picture
from narrowcast.engines import load_engine
from narrowcast.monitoring.figures import Figures, History
from narrowcast.monitoring.heat import rows
from narrowcast.monitoring.scrape import Scrape, address_of
from narrowcast.plan.summary import mean_bits
from watched import Watched, watched

ONCE = "--once", "--interval", 0.1
LIMIT_S = 60


@contextmanager
def serving(text: Callable[[], str]) -> Iterator[str]:
    """The address of a server whose /metrics is `text` at that moment."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text().encode() if self.path == "/metrics" else b"no")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Watched]:
    """A simulated model that has read what its plan was calibrated on."""
    model, text = load_engine().load(save_random("llama", tmp_path)), random_ids(2, 16)
    with watched(model, calibrate(model, [text], tp_size=2, codec="int4-group32-sym")) as found:
        found.read(text)
        yield found


def shown(url: str) -> dict[str, str]:
    """Lines of one picture by their first word."""
    lines = run("monitor", "top", url, *ONCE).splitlines()
    assert all(len(line) <= 80 for line in lines), lines
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}


def test_one_picture_says_what_the_report_does(server: Watched) -> None:
    report = server.report()
    with serving(server.text) as url:
        lines = shown(url)
    assert lines["narrowcast"] == url
    assert re.fullmatch(r"of 1 ranks, plan \w{12}, simulated, \w+", lines["1"])
    assert lines["tokens"] == "0.0 processed a second; generated: not told by this server"
    assert lines["requests"] == lines["latency"] == "not told by this server"
    assert lines["bits"] == f"{report.bits_per_value:.2f} a value now, {mean_bits(server.plan):.2f} planned"
    sent = sum(site.wire_bytes for site in report.sites.values())
    plain = sum(site.plain_bytes for site in report.sites.values())
    kilobytes = f"{sent / 1e3:.3g} KB sent, {(plain - sent) / 1e3:.3g} KB saved ({plain / sent:.1f} times fewer)"
    assert lines["bytes"] == f"{kilobytes}, 0 B a second"
    ratios = [site.samples.error / site.samples.expected for site in report.sites.values() if site.coded]
    assert lines["error"].startswith(f"{sum(ratios) / len(ratios):.2f} of the plan's on average, {max(ratios):.2f} at ")
    assert lines["nothing"] == "to remark"
    assert lines["self_attn.o_proj"] == lines["mlp.down_proj"] == "0 .."


# --- Where something is wrong ----------------------------------------------------------------------------------------


def told(*lines: str, sites: int = 2) -> Scrape:
    """What a rank tells of sites in as many layers, at 1000 values, ten tokens, and the plan's error each."""
    found = ['narrowcast_info{rank="0",plan="p"} 1', "narrowcast_ranks 1", 'narrowcast_tokens_total{rank="0"} 10']
    for layer in range(sites):
        labels = f'{{rank="0",site="model.layers.{layer}.mlp.down_proj"}}'
        figures = {"sent_values_total": 1000, "error_squares_total": 0.09, "sum_squares_total": 1}
        figures |= {"expected_error_squares_total": 0.09, "sampled_sums_total": 30, "guarded_tokens_total": 0}
        figures |= {"clipped_values_total": 0, "non_finite_values_total": 0}
        found += [f"narrowcast_site_{name}{labels} {value}" for name, value in figures.items()]
    replaced = {line.rpartition(" ")[0]: line for line in lines}
    found = [replaced.pop(line.rpartition(" ")[0], line) for line in found]
    return Scrape.of("\n".join([*found, *replaced.values(), ""]))


def pictured(*scrapes: Scrape) -> list[str]:
    history = History()
    for each in scrapes:
        history.add(each)
    return [str(line) for line in picture(history.figures(), "http://a:8000").renderables]


def test_of_a_long_path_the_end_is_shown() -> None:
    long = "/models/" + "a-long-name/" * 6 + "smollm2-135m"
    about, *_ = pictured(told(f'vllm:num_requests_running{{model_name="{long}"}} 1'))[1:]
    assert about.startswith("…") and about.endswith("name/smollm2-135m, 1 of 1 ranks, plan p") and len(about) == 80


def at(name: str, layer: int, value: float) -> str:
    return f'narrowcast_site_{name}{{rank="0",site="model.layers.{layer}.mlp.down_proj"}} {value}'


REMARKS = {
    "NaN or infinite at 1.mlp.down_proj, since the start": [at("non_finite_values_total", 1, 3)],
    "error 2.1 times the plan's at 0.mlp.down_proj": [at("error_squares_total", 0, 0.4)],
    "error 2.5 times the plan's at 1.mlp.down_proj and 1 more": [
        at("error_squares_total", 0, 0.4),
        at("error_squares_total", 1, 0.5625),
    ],
    "9.0% of the values are clipped at 0.mlp.down_proj": [at("clipped_values_total", 0, 90)],
    "50.0% of the tokens are far out of range at 1.mlp.down_proj": [at("guarded_tokens_total", 1, 5)],
    "1 of 2 ranks are gone": ["narrowcast_ranks 2"],
    "values take more bits than planned": [
        'narrowcast_sent_bytes_total{rank="0",codec="cast"} 2000',
        'narrowcast_sent_values_total{rank="0",codec="cast"} 1000',
        'narrowcast_planned_bytes_per_value{rank="0"} 1',
    ],
}


@pytest.mark.parametrize("remark", REMARKS)
def test_what_would_raise_an_alert_is_a_remark(remark: str) -> None:
    assert f"! {remark}" in pictured(told(*REMARKS[remark]))
    assert "nothing to remark" in pictured(told())


def test_an_error_of_few_sums_is_none_to_remark() -> None:
    above = at("error_squares_total", 0, 0.4)
    assert "nothing to remark" in pictured(told(above, at("sampled_sums_total", 0, 29)))


def test_an_error_is_a_cell_and_legible_without_colour() -> None:
    ratios = {0: 1.0, 1: 1.5, 2: 1.9, 3: 2.5}
    squares = [at("error_squares_total", layer, (0.3 * ratio) ** 2) for layer, ratio in ratios.items()]
    unsampled = [at(f"{whole}_squares_total", 4, 0) for whole in ("sum", "expected_error")]
    lines = pictured(told(*squares, *unsampled, at("non_finite_values_total", 5, 1), sites=7))
    assert lines[-1] == "mlp.down_proj    0  .-+# !."


def test_many_layers_are_several_rows() -> None:
    lines = pictured(told(sites=120))
    assert [line for line in lines if line.startswith("mlp")] == [
        f"mlp.down_proj    0  {'.' * 50}",
        f"mlp.down_proj   50  {'.' * 50}",
        f"mlp.down_proj  100  {'.' * 20}",
    ]
    assert max(map(len, lines)) <= 80


def test_sites_are_told_apart_by_what_they_do() -> None:
    sites = ["model.layers.0.a", "model.layers.2.a", "model.layers.2.b", "transformer.h.1.b", "lm_head"]
    assert list(rows(sites)) == [
        ("lm_head", None, ["lm_head"]),
        ("a", 0, ["model.layers.0.a", None, "model.layers.2.a"]),
        ("b", 0, [None, "transformer.h.1.b", "model.layers.2.b"]),
    ]


def test_errors_are_of_the_last_minutes_and_of_all_time_where_too_few_were_sampled() -> None:
    def later(layer: int, sums: int) -> list[str]:
        """An error twice the plan's in so many more sums, each of which counts like one before."""
        grown = {"error_squares_total": 0.36, "expected_error_squares_total": 0.09, "sampled_sums_total": 30}
        before = {"error_squares_total": 0.09, "expected_error_squares_total": 0.09, "sampled_sums_total": 30}
        return [at(name, layer, before[name] + more * sums / 30) for name, more in grown.items()]

    found = figures_of(told(sites=3), told(*later(0, 30), *later(1, 29), sites=3))
    ratios = {layer: found.error_ratios[f"model.layers.{layer}.mlp.down_proj"] for layer in range(3)}
    of_all = ((0.09 + 0.36 * 29 / 30) / (0.09 + 0.09 * 29 / 30)) ** 0.5
    assert ratios == pytest.approx({0: 2.0, 1: of_all, 2: 1.0})
    assert list(found.num_sampled.values()) == [30, 59, 30]


def test_rates_and_latencies_are_those_of_the_last_two_scrapes() -> None:
    def at_work(at: float, tokens: int, answers: int) -> Scrape:
        lines = [f"vllm:{kind}_tokens_total {tokens * share}" for kind, share in (("generation", 10), ("prompt", 1))]
        lines += ['vllm:num_requests_running{model_name="m"} 3', 'vllm:num_requests_waiting{model_name="m"} 1']
        for name, seconds in (("time_to_first_token", 0.25), ("inter_token_latency", 0.02)):
            # The first one took longer, before anybody looked.
            lines += [f"vllm:{name}_seconds_count {answers}", f"vllm:{name}_seconds_sum {9 + (answers - 1) * seconds}"]
        return replace(told(*lines), at=at)

    lines = pictured(at_work(0, 0, 1), at_work(60, 1000, 1), at_work(62, 1200, 5))
    assert lines[1].startswith("m, 1 of 1 ranks")
    assert "tokens   1,000.0 generated a second, 100.0 read" in lines
    assert "requests 3 running, 1 waiting" in lines
    assert "latency  first token 250 ms, between tokens 20 ms" in lines
    assert "latency  first token 9.00 s, between tokens 9.00 s" in pictured(at_work(0, 0, 1), at_work(1, 0, 1))


def test_a_server_that_was_started_again_is_looked_at_anew() -> None:
    long_ago = told('narrowcast_tokens_total{rank="0"} 1e6', at("guarded_tokens_total", 0, 1e6))
    assert figures_of(long_ago, told()).processed_per_s is None, "one scrape has no rate"
    assert set(figures_of(long_ago, told()).guarded.values()) == {0.0}


def figures_of(*scrapes: Scrape) -> Figures:
    history = History()
    for each in scrapes:
        history.add(each)
    return history.figures()


# --- Where there is nothing to see -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a:1", "http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/metrics"])
def test_addresses_of_a_server_and_of_its_api_will_do(given: str) -> None:
    assert address_of(given) == "http://a:1/metrics"


def test_what_cannot_be_watched_is_one_sentence() -> None:
    with serving(lambda: "x 1\n") as url:
        assert "expected metrics of narrowcast, found none among 1 others. Start narr" in refused("monitor", "top", url)
        assert "expected metrics, found status 404" in refused("monitor", "top", f"{url}/other")
    assert "expected a server, found Connection refused" in refused("monitor", "top", url)
    assert "expected an address of http or https" in refused("monitor", "top", "ftp://a")
    with serving(lambda: "<html>hello</html>") as url:
        assert "expected metrics of Prometheus" in refused("monitor", "top", url)
    with serving(lambda: "narrowcast_ranks 1\n") as url:
        assert "error    not told by this server" in run("monitor", "top", url, *ONCE)


def test_in_a_terminal_it_goes_on_until_ctrl_c() -> None:
    """Also where the server goes away meanwhile."""
    screen, terminal = pty.openpty()
    seen = bytearray()

    def until(words: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while words.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode()
            seen.extend(os.read(screen, 1 << 16))

    with ExitStack() as in_any_case:
        in_any_case.callback(os.close, screen)
        with serving(lambda: "narrowcast_ranks 1\n") as url:
            command = [sys.executable, "-m", "narrowcast", "monitor", "top", url, "--interval", "0.1"]
            settings = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
            process = subprocess.Popen(
                command, stdin=terminal, stdout=terminal, stderr=terminal, env=settings, start_new_session=True
            )
            in_any_case.callback(process.wait)
            in_any_case.callback(process.kill)
            os.close(terminal)
            until("0 of 1 ranks")
        until("no answer for")
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
