"""Metrics of a server: what its requests and its ranks did, as a Prometheus reads it while it serves."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics

from commands import save_plan, typed
from conftest import MODEL
from narrowcast import Plan
from narrowcast.monitoring import Snapshot
from narrowcast.plan.summary import mean_bits
from narrowcast.runtime.reports import Report
from narrowcast.serving.board import Board
from narrowcast.serving.desk import Desk
from narrowcast.serving.figures import Figures, Life
from narrowcast.serving.orders import Order, Orders
from narrowcast.serving.requests import Piece, Request, Token
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks
from servers import Command, Scrape, Server

Pools = Callable[[int], Ranks]
EVERY = 5
PARTS = "queue", "prefill", "decode"
RUNNING, WAITING = 4, 2
RANKS = {"0", "1"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plan(tmp_path_factory.mktemp("plans") / "two", "int4-feature")


@pytest.fixture(scope="module")
def server(plan: Path) -> Iterator[Server]:
    """Two ranks with a plan, one of five calls sampled."""
    limits = "--max-running", RUNNING, "--max-waiting", WAITING
    with Server(MODEL, "--plan", plan, "--dtype", "float32", "--sample-every", EVERY, *limits) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
    server.wait_until_idle()


def asked(prompt: str = "The sea was", **more: Any) -> dict[str, Any]:
    return {"model": "gutenberg-7m", "prompt": prompt, "temperature": 0, "max_tokens": 24, **more}


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


def test_requests_are_counted_under_vllms_names(server: Server, client: OpenAI) -> None:
    before = server.scrape()
    usages = [client.completions.create(**asked(prompt)).usage for prompt in ("Once upon", "My dear")]
    text = client.completions.create(**asked("He said that")).choices[0].text
    ended = client.completions.create(**asked("He said that", stop=text[9:14]))
    assert ended.choices[0].finish_reason == "stop"
    after = server.scrape()
    assert after.labels("vllm:num_requests_running", "model_name") == {"gutenberg-7m"}

    def more(name: str, **labels: str) -> float:
        return grown(before, after, f"vllm:{name}", **labels)

    assert more("request_success_total", finished_reason="length") == 3
    assert more("request_success_total", finished_reason="stop") == 1
    assert more("request_success_total") == 4
    prompts = [usage.prompt_tokens for usage in usages if usage is not None]
    assert ended.usage is not None
    said = 3 * 24 + ended.usage.completion_tokens
    assert more("prompt_tokens_total") == more("request_prompt_tokens_sum") == sum(prompts) + 2 * 3
    assert more("generation_tokens_total") == more("request_generation_tokens_sum") == said
    assert more("inter_token_latency_seconds_count") == said - 4
    for each in ("time_to_first_token", "e2e_request_latency", *(f"request_{x}_time" for x in PARTS)):
        assert more(f"{each}_seconds_count") == 4
    whole = more("e2e_request_latency_seconds_sum")
    assert sum(more(f"request_{each}_time_seconds_sum") for each in PARTS) == pytest.approx(whole, rel=1e-6)
    first = more("request_queue_time_seconds_sum") + more("request_prefill_time_seconds_sum")
    assert more("time_to_first_token_seconds_sum") == pytest.approx(first, rel=1e-6)
    assert more("inter_token_latency_seconds_sum") == pytest.approx(more("request_decode_time_seconds_sum"), rel=1e-6)


def test_bytes_of_each_rank_are_those_of_the_report(server: Server, client: OpenAI, plan: Path, tmp_path: Path) -> None:
    """As `generate` reports them for the same prompt and as many tokens."""
    path = tmp_path / "report.json"
    settings = "--plan", plan, "--dtype", "float32", "--prompt-chunks", 1, "--max-new-tokens", 24, "--json", path
    done = typed("generate", MODEL, *settings, "--prompt", "It is a truth")
    assert done.returncode == 0, done.stderr
    report = Report.from_json(json.loads(path.read_text(encoding="utf8"))["report"])
    before = server.scrape()
    client.completions.create(**asked("It is a truth"))
    after = server.scrape()
    assert after.labels("narrowcast_info", "rank") == after.labels("narrowcast_site_sent_bytes_total", "rank") == RANKS
    sums = {name: site for name, site in report.sites.items() if site.kind == "sum" and site.coded}
    assert after.labels("narrowcast_site_sent_bytes_total", "site") == sums.keys() and len(sums) > 3
    for name, site in sums.items():
        assert grown(before, after, "narrowcast_site_sent_bytes_total", rank="0", site=name) == site.wire_bytes
        assert grown(before, after, "narrowcast_site_sent_values_total", rank="0", site=name) == site.num_values
    for rank in RANKS:
        nbytes = grown(before, after, "narrowcast_sent_bytes_total", rank=rank, kind="sum")
        assert nbytes == grown(before, after, "narrowcast_site_sent_bytes_total", rank=rank)
        num_values = grown(before, after, "narrowcast_sent_values_total", rank=rank, kind="sum")
        assert 8 * nbytes / num_values == pytest.approx(report.bits_per_value, rel=0.01)
        assert grown(before, after, "narrowcast_tokens_total", rank=rank) == report.num_tokens
    clipped = grown(before, after, "narrowcast_site_clipped_values_total")
    assert clipped == sum(site.num_saturated for site in sums.values())
    assert after.value("narrowcast_ranks") == 2
    assert 8 * after.value("narrowcast_planned_bytes_per_value", rank="1") == mean_bits(Plan.load(plan))


def test_the_sampled_error_is_about_the_plans(server: Server, client: OpenAI) -> None:
    """Of text like that of calibration: what a few tokens lose differs by less than a factor of two."""
    before = server.scrape()
    text = (MODEL / "scoring.txt").read_text(encoding="utf8")[:800]
    client.completions.create(**asked(text, max_tokens=100))
    after = server.scrape()
    for site in after.labels("narrowcast_site_error_squares_total", "site"):
        for rank in RANKS:
            of = {"site": site, "rank": rank}
            sums = grown(before, after, "narrowcast_site_sampled_sums_total", **of)
            assert 100 / EVERY <= sums <= 101 / EVERY + 1
            noise = grown(before, after, "narrowcast_site_error_squares_total", **of)
            expected = grown(before, after, "narrowcast_site_expected_error_squares_total", **of)
            assert expected / 4 < noise < 4 * expected, site
            assert after.value("narrowcast_site_sampled_non_finite_total", **of) == 0
    assert grown(before, after, "narrowcast_relative_error_ratio_count", kind="sum") > 0
    assert grown(before, after, "narrowcast_sum_part_seconds_count", part="exchange") > 0


def test_counters_only_grow_whoever_scrapes_under_load(server: Server, client: OpenAI) -> None:
    def ask(number: int) -> None:
        client.completions.create(**asked(max_tokens=60, seed=number))

    def watch(number: int) -> list[dict[Any, float]]:
        seen = []
        for _ in range(8):
            counts = [each for each in server.scrape().samples if each.name.endswith(("_total", "_count", "_bucket"))]
            seen.append({(each.name, *sorted(each.labels.items())): each.value for each in counts})
        return seen

    with ThreadPoolExecutor(5) as pool:
        asking, watching = pool.map(ask, range(6)), pool.map(watch, range(3))
        watched = list(watching)
        list(asking)
    for seen in watched:
        for earlier, later in itertools.pairwise(seen):
            fewer = [key for key, value in earlier.items() if later[key] < value]
            assert not fewer
        assert seen[0] != seen[-1]


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline


def left_alone(server: Server, body: dict[str, Any]) -> httpx2.Client:
    """A client that has asked for a stream; whoever closes it leaves."""
    client = httpx2.Client(timeout=60)
    client.send(client.build_request("POST", f"{server.url}/completions", json={**body, "stream": True}), stream=True)
    return client


def test_those_who_are_refused_and_those_who_leave_are_told_apart(server: Server, client: OpenAI) -> None:
    before, places = server.scrape(), RUNNING + WAITING
    gone = [left_alone(server, asked(max_tokens=500)) for _ in range(places)]
    full = server.scrape()
    assert (full.value("vllm:num_requests_running"), full.value("vllm:num_requests_waiting")) == (RUNNING, WAITING)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(**asked(n=2))
    wait_for(lambda: 0 < server.scrape().value("vllm:kv_cache_usage_perc") < 1)
    for each in gone:
        each.close()
    server.wait_until_idle()
    wait_for(lambda: server.scrape().value("vllm:kv_cache_usage_perc") == 0)
    after = server.scrape()
    assert grown(before, after, "vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
    assert grown(before, after, "vllm:request_success_total", finished_reason="abort") == places
    assert grown(before, after, "vllm:request_success_total") == places
    assert grown(before, after, "vllm:e2e_request_latency_seconds_count") == 0


OF_VLLM = "metric names should not contain ':'"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Prometheus")
def test_promtool_remarks_on_the_colons_of_vllm_alone(server: Server) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=server.scrape().text, capture_output=True, text=True, timeout=60
    )
    remarks = (done.stdout + done.stderr).splitlines()
    assert [each for each in remarks if not each.endswith(OF_VLLM)] == []


def test_a_prometheus_has_the_format_that_it_asks_for(server: Server) -> None:
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    answer = httpx2.get(server.url.removesuffix("/v1") + "/metrics", headers=accept, timeout=60)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert "narrowcast_sent_bytes" in {family.name for family in open_metrics(answer.text)}
    assert server.get("/metrics").headers["Content-Type"].startswith("text/plain")


def test_series_are_bounded_by_sites_and_ranks(server: Server) -> None:
    """As docs/monitoring.md has it: so many a rank, and so many a site of a rank."""
    found = server.scrape()
    names = {each.name for each in found.samples if each.name.startswith("narrowcast_site_")}
    num_sites = len(found.labels("narrowcast_site_sent_bytes_total", "site"))
    assert len(names) == 11
    others = [each for each in found.samples if each.name.startswith("narrowcast_") and each.name not in names]
    assert len([each for each in found.samples if each.name in names]) == 11 * num_sites * len(RANKS)
    assert len(others) <= 1 + 150 * len(RANKS)


def test_a_scrape_waits_for_nobody_and_failures_are_counted(plan: Path) -> None:
    """A rank that hangs: the last figures of both are told, until it is lost and the server ends."""
    with Command(MODEL, "--plan", plan, "--timeout", 8) as server, server.client() as client:
        client.completions.create(**asked())
        before = server.scrape()
        with ThreadPoolExecutor(1) as pool:
            hung = pool.submit(client.completions.create, **asked(max_tokens=500))
            wait_for(lambda: server.scrape().value("vllm:num_requests_running") == 1)
            os.kill(server.ranks()[1], signal.SIGSTOP)
            begun = time.monotonic()
            found = server.scrape()
            assert time.monotonic() - begun < 6
            assert found.labels("narrowcast_tokens_total", "rank") == RANKS
            assert grown(before, found, "narrowcast_tokens_total") >= 0
            assert found.value("vllm:num_requests_running") == 1
            with pytest.raises(openai.InternalServerError, match="lost rank 1"):
                hung.result()
            begun = time.monotonic()
            found = server.scrape()
            assert time.monotonic() - begun < 2
            assert found.value("vllm:request_success_total", finished_reason="error") == 1
        status, errors = server.ended()
        assert status == 1 and "lost rank 1" in errors


def test_one_rank_without_a_plan_has_figures_of_requests_alone() -> None:
    """Before its first request, too."""
    with Server(MODEL) as server:
        found = server.scrape()
    about = next(each.labels for each in found.samples if each.name == "narrowcast_info")
    assert (about["plan"], about["transport"], about["rank"]) == ("", "", "0")
    assert found.value("narrowcast_ranks") == 1 and found.value("narrowcast_tokens_total") == 0
    assert found.value("vllm:request_success_total") == 0


# The parts


def snapshot(rank: int, num_ranks: int, plan: str = "") -> Snapshot:
    made = Snapshot.of(Report(sites={}), None, rank=rank, num_ranks=num_ranks, transport="")
    return Snapshot(**{**vars(made), "about": {**made.about, "plan": plan}})


def gathered() -> list[str]:
    """Between two orders; the ranks' texts differ in length."""
    ranks = TorchDistributedTransport()
    mine = snapshot(ranks.rank, ranks.world_size, plan="x" * 100 * ranks.rank)
    orders = Orders(ranks, lambda: mine)
    if not orders.leads:
        assert orders.receive().asks
        texts = orders.gather()
        assert texts == [] and orders.receive().ends
        return texts
    orders.give(Order(asks=True))
    texts = orders.gather()
    orders.give(Order(ends=True))
    return texts


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_first_rank_has_the_figures_of_all(ranks: Pools, num_ranks: int) -> None:
    texts = ranks(num_ranks).run(gathered)[0]
    found = list(map(Snapshot.from_text, texts))
    assert [(each.rank, len(each.about["plan"])) for each in found] == [(rank, 100 * rank) for rank in range(num_ranks)]


def told(rank: int) -> list[str]:
    return [snapshot(rank, 1).to_text()]


def test_scrapes_that_come_together_share_one_gathering() -> None:
    woken = threading.Semaphore(0)
    board = Board(woken.release, patience_s=30)
    assert board.begin(), "at the start, for whoever is scraped before any step"
    board.post(told(0))
    assert not board.begin()
    with ThreadPoolExecutor(5) as pool:
        scrapes = [pool.submit(board.snapshots) for _ in range(5)]
        for _ in scrapes:
            woken.acquire()
        assert board.begin()
        late = pool.submit(board.snapshots)
        board.post(told(1))
        assert [[each.rank for each in scrape.result()] for scrape in scrapes] == [[1]] * 5
        woken.acquire()
        assert board.begin(), "for the one that came after the others' figures were gathered"
        board.post(told(2))
        assert [each.rank for each in late.result()] == [2]
    assert not board.begin()


def test_a_scrape_has_the_last_figures_when_no_step_comes() -> None:
    board = Board(lambda: None, patience_s=0.05)
    assert board.snapshots() == []
    assert board.begin()
    board.post(told(3))
    assert [each.rank for each in board.snapshots()] == [3]
    board = Board(lambda: None, patience_s=60)
    board.close()
    begun = time.monotonic()
    assert board.snapshots() == [] and time.monotonic() - begun < 5


def test_times_of_a_request_are_counted_as_vllm_counts_them() -> None:
    figures, life = Figures(max_len=300), Life(num_read=7, came=10.0)
    life.begun = 11.0
    for now, finish in ((14.0, None), (14.5, None), (16.5, "length")):
        figures.hear(life, Piece(tokens=[Token(1)], finish=finish), now)  # type: ignore[arg-type]
    times = figures.queue, figures.prefill, figures.decode, figures.whole, figures.first_token, figures.next_token
    assert [each.total for each in times] == [1.0, 3.0, 2.5, 6.5, 4.0, 2.5]
    assert [sum(each.counts) for each in times] == [1, 1, 1, 1, 1, 2]
    assert (figures.num_read, figures.num_said, figures.answer_tokens.total) == (7, 3, 3.0)
    assert figures.prompt_tokens.bounds == (1, 2, 5, 10, 20, 50, 100, 200)
    assert figures.endings == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_a_scored_prompt_without_an_answer_has_no_first_token() -> None:
    figures = Figures(max_len=8)
    figures.hear(Life(num_read=5, came=1.0, begun=2.0), Piece(finish="length"), 3.0)
    assert (figures.num_read, figures.endings["length"], sum(figures.first_token.counts)) == (5, 1, 0)


def test_every_request_ends_once() -> None:
    desk = Desk(max_running=2, max_waiting=1, max_len=8)
    request = Request(prompt=(1,), max_new_tokens=1)
    names = desk.hand_in([(request, lambda _: None)] * 3)
    assert desk.next() and desk.next()
    desk.say(names[0], Piece(tokens=[Token(1)], finish="stop"))
    desk.withdraw(names)
    desk.hand_in([(request, lambda _: None)])
    desk.fail("broken")
    desk.fail("again")
    assert desk.figures().endings == {"stop": 1, "length": 0, "abort": 2, "error": 1}
