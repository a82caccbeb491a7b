"""Baselines of a server: itself is the same, a slower one and a coarser plan are worse, and what is missing is said."""

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import commands
from commands import run, save_plan, typed
from conftest import MODEL
from narrowcast.errors import InvalidInputError, NarrowcastError
from narrowcast.evaluation import Baseline
from narrowcast.monitoring.export import RULES
from narrowcast.scorecard import SCENARIOS, Record, Scenario, Scorecard, Workload, measured, started
from narrowcast.scorecard.metrics import Metrics
from narrowcast.scorecard.page import page
from narrowcast.scorecard.workload import texts_of
from narrowcast.serving import Job
from narrowcast.serving.remote import Api
from servers import Proxy, Server, children

WORKFLOW = Path(__file__).parents[1] / "examples" / "github" / "baseline.yml"
SCENARIO = "prompt_tokens = [12, 40]\nnew_tokens = 5\nrequests = 2\nconcurrency = 2\n"
NOISE = "--tolerance", "200%"  # of other tests on this machine
SENT = """\
# TYPE narrowcast_sent_bytes_total counter
narrowcast_sent_bytes_total{rank="0",kind="sum",codec="x{y}",hop="partial"} 300
narrowcast_sent_bytes_total{rank="1",kind="sum",codec="none",hop="once"} 1.5e2
narrowcast_tokens_total{rank="0"} 10
narrowcast_tokens_total{rank="1"} 10
narrowcast_info{kernels="avx",plan="",rank="0",transport="tcp",version="0.1"} 1
narrowcast_ranks 2
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(MODEL, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    (folder / "few.toml").write_text(SCENARIO)
    return folder


@pytest.fixture(scope="module")
def recorded(server: Server, folder: Path) -> Path:
    path = folder / "base.json"
    done = record(server.url, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: gutenberg-7m: NLL, nats a token 3.8")
    return path


def record(where: object, path: Path, *more: object) -> subprocess.CompletedProcess[str]:
    asked = "--scenario", path.parent / "few.toml", "--text", MODEL / "scoring.txt", "--num-samples", 6, "--rounds", 5
    return typed("baseline", "record", where, "-o", path, *asked, *more)


def check(where: object, path: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return typed("baseline", "check", where, "--baseline", path, *NOISE, *more)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("narrowcast: error: ") == 1 and "Traceback" not in done.stderr
    return done.stderr


def rows(shown: str) -> dict[str, list[str]]:
    """Cells of the card's rows, by figure."""
    lines = [line.strip("| ").split("|") for line in shown.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_server_is_the_same_as_itself(server: Server, recorded: Path, folder: Path) -> None:
    report = folder / "card.json"
    done = check(server.url, recorded, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "## gutenberg-7m: nothing got worse" in done.stdout
    assert "Nothing that is known of server, plan and hardware differs." in done.stdout
    found = json.loads(report.read_text())
    assert found["worse"] == [] and found["differs"] == {}
    assert found["changes"]["nll_nats"]["verdict"] == "same"
    assert found["changes"]["nll_nats"]["change"] == 0, "scores are the same bits"
    assert len(found["by_round"]["token_ms"]) == len(found["baseline"]["by_round"]["token_ms"]) == 5


def test_a_slower_server_is_worse_in_speed_alone(
    server: Server, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is at work on this machine, of which it shall not hear."""
    monkeypatch.setattr("narrowcast.scorecard.record.machine_ms", lambda: 1e-3)
    with Proxy(server.url, delay_s=0.1) as slow:
        done = check(slow.url, recorded, "--tolerance", "50%")
    assert done.returncode == 1
    verdicts = {name: cells[-1] for name, cells in rows(done.stdout).items()}
    assert verdicts["a token after it, ms"] == verdicts["tokens a second"] == "**worse**"
    assert verdicts["NLL, nats a token"] == "same"
    assert "got worse" in done.stdout.splitlines()[0]


def test_an_alert_compares_first_tokens_with_those_of_a_baseline(recorded: Path, tmp_path: Path) -> None:
    export = "monitor", "export", tmp_path / "watch", "--baseline"
    run(*export, recorded)
    seconds = statistics.mean(json.loads(recorded.read_text())["by_round"]["first_token_ms"]) / 1e3
    assert f"* {seconds:g}\n" in (tmp_path / "watch" / RULES).read_text()
    assert "Leave out one of the two" in commands.refused(*export, recorded, "--ttft", 1)
    assert "no such file" in commands.refused(*export, tmp_path / "none")


SLOWER = ["first_token_ms", "token_ms"]


def test_speeds_of_other_hardware_are_judged_only_if_asked(recorded: Path) -> None:
    before = Record.of(Baseline.load(recorded))
    slower = before.by_round | {name: tuple(1e3 * each for each in before.by_round[name]) for name in SLOWER}
    elsewhere = replace(before, by_round=slower, about={**before.about, "hardware": "an abacus"})
    card = Scorecard.of(before, elsewhere)
    assert card.worse == [] and rows(page(card, "base.json"))["first token, ms"][-1] == "not judged"
    assert rows(page(card, "base.json"))["hardware"][1] == "an abacus"
    assert Scorecard.of(before, elsewhere, any_hardware=True).worse == SLOWER
    fixed = {"machine_ms": tuple(2 * each for each in before.by_round["machine_ms"])}
    assert Scorecard.of(before, replace(elsewhere, by_round=slower | fixed), any_hardware=True).worse == SLOWER
    assert Scorecard.of(before, replace(elsewhere, about=before.about)).worse == SLOWER


def test_speeds_are_not_judged_of_a_machine_that_is_slower_itself(recorded: Path) -> None:
    """And where it may be up to 1.6 times as slow, 1.5 times tells nothing."""
    before, token = Record.of(Baseline.load(recorded)), (20.0, 20.1, 20.2, 20.3, 20.4)

    def of(machine: tuple[float, ...], times: float) -> Record:
        return replace(before, by_round={"machine_ms": machine, "token_ms": tuple(times * each for each in token)})

    quiet, noisy = (10.0, 10.1, 10.2, 10.3, 10.4), (10.0, 16.0, 9.0, 12.0, 11.0)
    slower = tuple(2 * each for each in quiet)
    assert Scorecard.of(of(quiet, 1), of(quiet, 1.5)).worse == ["token_ms"]
    assert Scorecard.of(of(quiet, 1), of(noisy, 1.5)).verdict("token_ms") == "unclear"
    assert Scorecard.of(of(quiet, 1), of(noisy, 2)).worse == ["token_ms"]
    assert Scorecard.of(of(slower, 1), of(quiet, 1.5)).worse == ["token_ms"], "one that is faster owes nothing"
    card = Scorecard.of(of(quiet, 1), of(slower, 9))
    assert card.worse == [] and rows(page(card, "base.json"))["a token after it, ms"][-1] == "not judged"
    assert "fixed work took longer here, too" in page(card, "base.json")


def test_a_plan_of_two_bits_is_worse_in_quality(recorded: Path, tmp_path: Path) -> None:
    plan = save_plan(tmp_path / "plan", "feature(bits=2)")
    done = check(MODEL, recorded, "--plan", plan, "--dtype", "float32")
    assert done.returncode == 1
    found = rows(done.stdout)
    assert found["NLL, nats a token"][-1] == "**worse**"
    assert found["ranks"][1] == "2" and found["plan"][0] == "none"


def test_a_model_is_served_for_it_and_writes_the_texts(tmp_path: Path) -> None:
    """None but an earlier baseline is replaced, and that only if asked."""
    (tmp_path / "few.toml").write_text(SCENARIO)
    path = tmp_path / "base.json"
    asked = "baseline", "record", MODEL, "-o", path, "--scenario", tmp_path / "few.toml", "--num-samples", 2
    assert typed(*asked, "--rounds", 5).returncode == 0
    found = Record.of(Baseline.load(path))
    assert found.about.items() >= {"server": "narrowcast", "ranks": "1", "plan": "none", "weights": "stored"}.items()
    assert len(set(found.workload.texts)) == 2 and all(each.startswith("The ") for each in found.workload.texts)
    assert min(found.by_sequence["nll_nats"].weights) > 200
    before = path.read_bytes()
    assert "a file that exists" in typed(*asked).stderr
    another = "baseline", "check", MODEL, "--baseline", tmp_path / "other.json", "--json", path
    assert "a new file or an earlier report, found a report of baseline record" in refused(typed(*another))
    card = tmp_path / "card.json"
    card.write_text(path.read_text().replace("baseline record", "baseline check"))
    assert "found a report of baseline check" in typed(*asked, "-o", card, "--overwrite").stderr
    assert path.read_bytes() == before


def test_bytes_are_those_of_all_ranks_by_token(server: Server, folder: Path, tmp_path: Path) -> None:
    """One rank's bytes, on average; here 450 of 20 tokens more at each look."""
    with Proxy(server.url, answers={"/metrics ": (200, SENT)}) as proxy:
        found = Metrics.of(Api(proxy.url))
    assert found is not None
    assert (found.sent_bytes, found.tokens) == (450, 20)
    assert found.about == {"kernels": "avx", "plan": "none", "transport": "tcp", "version": "0.1", "ranks": "2"}
    assert Metrics(sent_bytes=1350, tokens=60, about={}).sent_per_token(found) == 22.5
    assert found.sent_per_token(found) == 0
    assert Metrics.of(Api(server.url)) is None or server.get("/metrics").text.count("narrowcast_tokens_total")


NO_LOGPROBS = {'"logprobs"': (400, '{"error": {"message": "logprobs are not served here"}}')}


def test_without_log_probabilities_quality_is_left_out(server: Server, recorded: Path, folder: Path) -> None:
    with Proxy(server.url, answers=NO_LOGPROBS) as proxy:
        done = check(proxy.url, recorded)
        assert done.returncode == 0, done.stdout
        assert "not compared; now, the server does not score texts (" in done.stdout
        assert "logprobs are not served here" in done.stdout and "NLL, nats a token" not in rows(done.stdout)
        done = record(proxy.url, folder / "without.json")
        assert done.returncode == 0 and "no NLL, nats a token: the server does not score" in done.stdout
    assert "not compared; in the baseline, the server" in check(server.url, folder / "without.json").stdout


BROKEN: dict[str, tuple[dict[str, tuple[int, str]], str]] = {
    "fails": ({'"stream"': (503, '{"error": {"message": "lost rank 1 while adding"}}')}, "lost rank 1 while adding"),
    "fails in the middle": (
        {'"stream"': (200, 'data: {"choices": [{}]}\n\ndata: {"error": {"message": "lost rank 1"}}\n\n')},
        "lost rank 1",
    ),
    "ends early": (
        {'"stream"': (200, 'data: {"choices": [{}], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n')},
        "expected an answer of 5 tokens, as max_tokens and ignore_eos ask for, found 2",
    ),
    "talks nonsense": ({'"stream"': (200, "data: {\n\n")}, "expected a server of OpenAI's API"),
    "counts nothing": ({'"max_tokens": 1': (200, "{}")}, "expected usage in each answer, found none"),
    "has no model": ({"/v1/models": (200, '{"data": []}')}, "expected a model at /v1/models, found none"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_server_that(how: str, server: Server, recorded: Path) -> None:
    answers, sentence = BROKEN[how]
    with Proxy(server.url, answers=answers) as proxy:
        assert sentence in refused(check(proxy.url, recorded))


def altered(recorded: Path, **change: Any) -> Path:
    """The baseline with other values at its top."""
    path = recorded.with_name("altered.json")
    path.write_text(json.dumps(json.loads(recorded.read_text()) | change))
    return path


def test_what_cannot_be_compared_is_refused(server: Server, recorded: Path, folder: Path) -> None:
    for change, sentence in (
        ({"model": "other"}, "model gutenberg-7m, found other"),
        ({"characters_per_token": 2.5}, "characters_per_token"),
        ({"workload": None}, "expected a baseline of a server, found another report. Write one with baseline record."),
        ({"by_sequence": None}, "figures by sequence"),
    ):
        assert sentence in refused(check(server.url, altered(recorded, **change)))
    assert "no such file. Write one with" in refused(check(server.url, folder / "none.json"))
    assert "Connection refused" in refused(check("http://127.0.0.1:9", recorded))
    assert "--plan: expected a MODEL" in refused(check(server.url, recorded, "--plan", folder / "plan"))
    assert "Write it as 5%." in refused(check(server.url, recorded, "--tolerance", "0.05"))
    assert "a file of its own" in refused(check(server.url, recorded, "--json", recorded))
    workload = json.loads(recorded.read_text())["workload"]
    workload["scenario"]["link"] = "1Gbps,1ms"
    on_a_link = altered(recorded, workload=workload)
    assert "a MODEL, whose ranks are started on the link" in refused(check(server.url, on_a_link))


def test_other_texts_are_other_items(server: Server, recorded: Path) -> None:
    by_sequence = json.loads(recorded.read_text())["by_sequence"]
    by_sequence["nll_nats"]["weights"][0] -= 1
    other = altered(recorded, by_sequence=by_sequence)
    assert "items of nll_nats as scored, found other items" in refused(check(server.url, other))


def test_ctrl_c_leaves_no_baseline_behind(server: Server, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text(SCENARIO)
    with Proxy(server.url, delay_s=0.5) as slow:
        command = "baseline", "record", slow.url, "-o", tmp_path / "base.json", "--scenario", tmp_path / "few.toml"
        process = subprocess.Popen(
            [sys.executable, "-m", "narrowcast", *map(str, command)], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert "s so far" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "narrowcast: interrupted; no file was left half-written" in process.communicate(timeout=30)[1]
    assert not (tmp_path / "base.json").exists()


# The example

STEPS = {
    step.get("name", step["run"]): step["run"]
    for step in yaml.safe_load(WORKFLOW.read_text(encoding="utf8"))["jobs"]["baseline"]["steps"]
    if "run" in step
}


def test_the_workflow_asks_for_what_there_is() -> None:
    """Commands and options: with --help, an option that is not known is still an error."""
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf8"))
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}  # YAML 1.1 takes `on` for true
    commands = [shlex.split(STEPS[name].partition("|")[0].replace("\\\n", " ")) for name in ("record", "check")]
    for name, *arguments in commands:
        assert name == "narrowcast" and f"baseline {arguments[1]} [OPTIONS]" in run(*arguments, "--help")
    assert workflow["defaults"]["run"]["shell"] == "bash", "which has pipefail"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_workflow_records_and_checks(tmp_path: Path) -> None:
    save_plan(tmp_path / "model.plan", "group(bits=4, size=32)")
    (tmp_path / "few.toml").write_text(SCENARIO)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    summary = tmp_path / "summary.md"
    settings = {
        **os.environ,
        "PATH": path,
        "SCENARIO": "few.toml",
        "MODEL": str(MODEL),
        "PLAN": "model.plan",
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    for step in (f"{STEPS['record']} --num-samples 4", STEPS["check"]):
        shell = "bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step
        done = subprocess.run(shell, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode < 2, done.stderr  # beside other tests, speed may well differ
    assert rows(summary.read_text())["NLL, nats a token"][-1] == "same"
    assert json.loads((tmp_path / "scorecard.json").read_text())["changes"]["nll_nats"]["change"] == 0


# The workload


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_that_come_with_it(name: str) -> None:
    scenario = Scenario.load(name)
    fields = scenario.to_json()
    assert fields.pop("name") == name
    assert Scenario.of(name, fields) == scenario


def test_a_scenario_that_a_model_has_no_room_for(server: Server, folder: Path) -> None:
    done = record(server.url, folder / "long.json", "--scenario", "long-prompt")
    expected = "scenario long-prompt: expected 512 tokens at most of prompt and answer, as gutenberg-7m has room for"
    assert done.returncode == 1 and f"{expected}, found 1040" in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prompt_tokens = [", "expected TOML with prompt_tokens"),
        ("new_tokens = 4", "expected prompt_tokens, new_tokens, requests and concurrency"),
        (SCENARIO + "speed = 3", "found prompt_tokens, new_tokens, requests, concurrency, speed"),
        (SCENARIO.replace("[12, 40]", "12"), "prompt_tokens of 1 or more, found 0"),
        (SCENARIO.replace("40", "-40"), "prompt_tokens of 1 or more, found -40"),
        (SCENARIO.replace("= 5", "= 1"), "new_tokens of 2 or more"),
        (SCENARIO.replace("= 5", "= 5.0"), "new_tokens of 1 or more, found 5.0"),
        (SCENARIO.replace("concurrency = 2", "concurrency = 4"), "4 requests or more"),
        (SCENARIO + 'link = "fast"', "found 'fast'"),
    ],
)
def test_a_scenario_that_is_none(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=re.escape(sentence)):
        Scenario.load(str(tmp_path / "mine.toml"))


def test_a_scenario_that_is_not_there() -> None:
    with pytest.raises(InvalidInputError, match="batch, chat, long-prompt, slow-link or a file, found none"):
        Scenario.load("none")


def test_prompts_are_the_same_every_time_but_for_their_opening() -> None:
    """So that no server has them in a cache of equal beginnings, neither of another round nor of another run."""
    workload = Workload(scenario=Scenario.load("chat"), rounds=5, texts=("one", "two"))
    first, again, next_round = (workload.prompts(number, 4.0) for number in (0, 0, 1))
    for prompts in zip(first, again, next_round, strict=True):
        (opening, rest), (other_opening, same), (_, other) = (prompt.split(". ", 1) for prompt in prompts)
        assert opening != other_opening and len(opening.split()) == 6
        assert rest[: len(same)] == same[: len(rest)] and rest != other
    assert [round(len(prompt) / 4, -1) for prompt in first[:4]] == pytest.approx([32, 64, 128, 256], abs=10)


def test_texts_to_score_are_pieces_of_words(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 520 + "\f" + "x" * 2100 + "\f" + "short")
    found = texts_of(path, 10)
    assert [len(each) for each in found] == [999, 999, 600, 1000, 1000]
    path.write_text("word " * 100)
    with pytest.raises(InvalidInputError, match=r"found 0\. Pass more text"):
        texts_of(path, 10)


def test_a_card_of_bytes(recorded: Path) -> None:
    """More bytes are worse beyond the tolerance, on any hardware; of what one record lacks, it says so."""
    record = Record.of(Baseline.load(recorded))
    sent = {
        number: replace(record, by_round={"sent_bytes_per_token": (number,) * 8}, unknown={})
        for number in (1000.0, 1040.0, 1200.0)
    }
    assert Scorecard.of(sent[1000.0], sent[1200.0]).worse == ["sent_bytes_per_token"]
    assert Scorecard.of(sent[1000.0], sent[1040.0]).worse == []
    assert Scorecard.of(sent[1000.0], record).unknown["sent_bytes_per_token"].startswith("now, ")


@pytest.mark.slow
def test_ranks_on_an_emulated_link(emulator: None, tmp_path: Path) -> None:
    """A link with 8 ms between two ranks is felt in every token."""
    (tmp_path / "few.toml").write_text(SCENARIO + 'link = "100Mbps,8ms"')
    plan, path = save_plan(tmp_path / "plan", "group(bits=4, size=32)"), tmp_path / "base.json"
    done = record(MODEL, path, "--plan", plan, "--num-samples", 2)
    assert done.returncode == 0, done.stderr
    (found,) = [Record.of(Baseline.load(path)).by_round["token_ms"]]
    assert min(found) > 16 * 8


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named(rank: int) -> None:
    before = descendants(os.getpid())
    workload = Workload(
        scenario=Scenario.load("chat"), rounds=5, texts=("It was the best of times.", "It was the worst of times.")
    )
    with (
        pytest.raises(NarrowcastError, match=rf"rank {rank} was ended by SIGKILL|lost rank {rank} "),
        started(Job(model=str(MODEL), tp_size=2), workload.scenario) as subject,
    ):
        ranks = sorted(pid for pid in descendants(os.getpid()) - before if not descendants(pid))[-2:]
        os.kill(ranks[rank], signal.SIGKILL)
        measured(subject, workload)


def descendants(pid: int) -> set[int]:
    found = set(children(pid))
    return found.union(*map(descendants, found))
