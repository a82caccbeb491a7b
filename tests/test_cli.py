"""The command line as its user meets it: what it prints, exit codes, one sentence an error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from commands import run, typed
from conftest import MODEL
from models import save_random
from narrowcast import Plan, calibrate
from narrowcast.__main__ import TRACEBACK
from narrowcast.calibration.text import sequences
from narrowcast.cli import app
from narrowcast.codecs import PRESETS, FeatureCodec, TransformCodec
from narrowcast.engines import load_engine

TEXT = str(MODEL / "scoring.txt")
SHORT = "--text", TEXT, "--num-samples", 8, "--max-seq-len", 64


def narrowcast(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a command prints: in this process, or in one of its own if that has another environment."""
    done = in_a_process(*arguments, **environment) if environment else typed(*arguments)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def in_a_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "narrowcast", *map(str, arguments)]
    settings = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=settings)


def refused(*arguments: object) -> str:
    done = narrowcast(*arguments, check=False)
    assert done.returncode == 1
    assert done.stderr.count("narrowcast: error: ") == 1, done.stderr
    assert TRACEBACK not in done.stderr, "the error was not expected"
    return done.stderr


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "two"
    done = narrowcast("calibrate", MODEL, "-tp", 2, "--codec", "int4-feature", *SHORT, "-o", path)
    assert done.stdout.startswith(f"{path}: 16 sites, tp_size 2, int4-feature, 4.441 bits a value, from 6 sequences, 3")
    assert "verdict: none noticed; KL 0.00" in done.stdout
    return path


# Both are 130 to a shell: Python ends by the signal if it came while a string of code was run, as imports do.
INTERRUPTED = 130, -signal.SIGINT

COMMANDS = {
    "demo": "--codec --json --tensor-parallel-size --timeout",
    "estimate": (
        "--codec --experts --input-len --json --link --machine --pipeline-parallel-size --tensor-parallel-size "
        "--transport --weights"
    ),
    "calibrate": (
        "--bits --codec --device --dtype --experts --first-tokens --max-seq-len --nnodes --no-feedback --num-samples "
        "--output --overwrite --pipeline-parallel-size --real --target-kl --tensor-parallel-size --text --timeout "
        "--weights"
    ),
    "evaluate": (
        "--algorithm --baseline --device --dtype --json --limit --max-seq-len --no-feedback --num-samples --plan "
        "--prompt-chunks --real --report --sites --tasks --text --timeout --weights"
    ),
    "inspect": "--overwrite --plot",
    "tune": "--output --overwrite --timeout --transport --weights",
    "generate": (
        "--chat --dtype --file --json --max-new-tokens --no-feedback --plan --prompt --prompt-chunks --replicate "
        "--seed --temperature --timeout --transport --weights"
    ),
    "serve": (
        "--api-key --cache-tokens --dtype --host --max-len --max-running --max-waiting --name --no-feedback --plan "
        "--port --replicate --sample-every --tensor-parallel-size --timeout --transport --weights"
    ),
    "chat": "--api-key --dtype --seed --system --temperature --weights",
    "pack": "--overwrite --weights",
    "rotate": "--axes --device --max-seq-len --num-samples --overwrite --tensor-parallel-size --text",
    "bench": (
        "--codec --json --link --prompt-chunks --replicate --size --tensor-parallel-size --timeline --timeout "
        "--transport --weights"
    ),
    "baseline record": (
        "--api-key --dtype --num-samples --output --overwrite --plan --rounds --scenario --tensor-parallel-size --text "
        "--weights"
    ),
    "baseline check": (
        "--any-hardware --api-key --baseline --dtype --json --plan --tensor-parallel-size --tolerance --tolerance-nats "
        "--weights"
    ),
    "codecs": "",
    "monitor export": "--baseline --error-factor --overwrite --runbook --ttft",
    "monitor top": "--interval --once",
    "doctor": "--hosts --json --model --node-rank --plan --timeout",
}


def commands() -> dict[str, Any]:
    """By name, those of a family with the family's before it."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        family = getattr(command, "commands", None)
        found |= {name: command} if family is None else {f"{name} {each}": family[each] for each in family}
    return found


def options() -> dict[str, dict[str, Any]]:
    """Defaults of every command's options by name."""
    return {
        name: {max(each.opts, key=len): each.default for each in command.params if each.param_type_name == "option"}
        for name, command in commands().items()
    }


def test_commands_and_options_are_pinned() -> None:
    """Eighteen commands, 150 options: someone who adds one adds it here, too, and says so in the CHANGELOG."""
    assert {command: " ".join(sorted(found)) for command, found in options().items()} == COMMANDS
    assert sum(map(len, options().values())) == 150


def test_an_option_has_one_default() -> None:
    """But where one command asks for several of what another has one of, can do without, or looks at the model."""
    defaults: dict[str, set[str]] = {}
    for found in options().values():
        for name, default in found.items():
            defaults.setdefault(name, set()).add(str(default))
    several = {name: values for name, values in defaults.items() if len(values) > 1}
    assert several.keys() <= {
        "--codec",
        "--link",
        "--prompt-chunks",
        "--replicate",
        "--transport",
        "--tensor-parallel-size",
    }, several


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command: str) -> None:
    assert len(run(*command.split(), "--help").strip().splitlines()) <= 47


@pytest.mark.parametrize("option", ["-tp", "--tensor-parallel-size"])
def test_tp_is_spelt_as_users_of_vllm_know_it(tmp_path: Path, option: str) -> None:
    narrowcast("calibrate", MODEL, option, 3, "--codec", "int4-feature", *SHORT, "--output", tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").tp_size == 3


def test_a_model_computes_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    engine, path = load_engine(), tmp_path / "plan"
    text = sequences(engine.load_tokenizer(MODEL), MODEL / "scoring.txt", length=64, limit=2)
    asked = "calibrate", MODEL, "--codec", "int4-feature", "--text", TEXT, "--num-samples", 2, "--max-seq-len", 64
    for dtype, stored in (("float32", torch.float32), ("auto", torch.bfloat16)):
        model = engine.load(MODEL, dtype=dtype)
        assert {each.dtype for each in model.parameters()} == {stored}
        narrowcast(*asked, "--dtype", dtype, "-o", path, "--overwrite")
        assert Plan.load(path).fingerprint == calibrate(model, text, tp_size=2, codec="int4-feature").fingerprint


def test_evaluate_real_equals_simulated(plan: Path, tmp_path: Path) -> None:
    """And a second run replaces its own report."""
    reports = []
    for extra in ([], ["--real"]):
        path = tmp_path / "report.json"
        arguments = "evaluate", MODEL, "--plan", plan, "--num-samples", 3, "--dtype", "float32"
        narrowcast(*arguments, "--json", path, *extra)
        reports.append(json.loads(path.read_text(encoding="utf8")))
    simulated, real = reports
    assert real["real"] and not simulated["real"]
    for figure in ("bits_per_value", "wire_bytes_per_token", "num_tokens", "tp_size"):
        assert simulated[figure] == real[figure]
    assert simulated["wire_bytes_per_token"] == 15 * 134 + (256 + 2 * 4)  # the last sum in int8-group128
    assert simulated["bits_per_value"] == simulated["wire_bytes_per_token"] / 16 / 256 * 8
    # Matrix products may round differently with another number of threads; scores then move a little.
    assert real["kl_nats"] == pytest.approx(simulated["kl_nats"], rel=0.01)
    assert real["perplexity"] == pytest.approx(simulated["perplexity"], rel=0.001)
    assert 0.7 < real["top1_agreement"] < 1
    assert real["uncompressed_bytes_per_token"] == {"model.embed_tokens": 1024.0, "lm_head": 8192.0}  # in FP32


def test_calibrate_on_ranks_writes_the_plan_of_one_process(plan: Path, tmp_path: Path) -> None:
    """At 1 thread a rank, matrix products may round differently: the same sites, and ranges within a rounding."""
    path = tmp_path / "real"
    arguments = "calibrate", MODEL, "-tp", 2, "--codec", "int4-feature", *SHORT, "-o", path, "--real"
    assert "16 sites, tp_size 2, int4-feature, 4.441 bits a value, from 6 sequences" in narrowcast(*arguments).stdout
    found, expected = Plan.load(path), Plan.load(plan)
    assert found.model == expected.model and found.calibration.keys() == expected.calibration.keys()
    for key, value in expected.calibration.items():
        assert found.calibration[key] == (pytest.approx(value, rel=0.1) if key.startswith("kl_nats") else value)
    for name, site in expected.sites.items():
        for mine, theirs in zip(found.sites[name].codecs, site.codecs, strict=True):
            assert type(mine) is type(theirs)
            assert not isinstance(mine, FeatureCodec) or torch.allclose(
                mine.scale.float(), theirs.scale.float(), rtol=0.05
            )
    assert "a new file" in refused(*arguments)


def test_a_pipeline_with_a_codec_for_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    codecs = ["--codec", "int8-feature", "--codec", "logits=int8-group128"]
    split, text = ["-tp", 1, "-pp", 2], ["--text", TEXT, "--num-samples", 4, "--max-seq-len", 64]
    done = narrowcast("calibrate", MODEL, *split, *codecs, *text, "-o", path)
    assert "2 sites, tp_size 1, pp_size 2, " in done.stdout and "logits=int8-group128" in done.stdout
    assert "boundary" in narrowcast("inspect", path).stdout
    prompts = ["--prompt", "The sea", "--prompt", "A much longer prompt about"]
    done = narrowcast("generate", MODEL, "--plan", path, *prompts, "--max-new-tokens", 8)
    assert done.stdout.startswith("==> The sea <==\n") and "\n==> A much longer prompt about <==\n" in done.stdout
    assert "uncompressed" not in done.stderr
    reports = []
    for extra in ([], ["--real"]):  # what both stages send, however it runs
        report = tmp_path / "report.json"
        narrowcast("evaluate", MODEL, "--plan", path, "--num-samples", 1, "--max-seq-len", 32, "--json", report, *extra)
        reports.append(json.loads(report.read_text(encoding="utf8")))
    simulated, real = reports
    for site in (*simulated["sites"].values(), *real["sites"].values()):
        del site["passed"]  # a stage that receives has a call, too
    for figure in ("sites", "num_saturated", "num_guarded", "bits_per_value", "wire_bytes_per_token"):
        assert simulated[figure] == real[figure]
    assert {site["wire_bytes"] for site in real["sites"].values()} == {32 * 260, 32 * 4224}  # E=256 and V=4096, coded
    wrong = refused("calibrate", MODEL, "-tp", 2, "--codec", "sums=bf16", "--text", TEXT, "-o", tmp_path / "other")
    assert "kinds of sites among sum, gather" in wrong


@pytest.mark.slow
def test_generate_starts_its_ranks_or_uses_those_of_torchrun(plan: Path) -> None:
    arguments = ["generate", str(MODEL), "--plan", str(plan), "--prompt", "The sea", "--max-new-tokens", "8"]
    own = narrowcast(*arguments, "--prompt", "A much longer prompt about", "--dtype", "float32")
    assert own.stdout.startswith("==> The sea <==\n") and "\n==> A much longer prompt about <==\n" in own.stdout
    assert "sent 4.4414 bits a value" in own.stderr  # 15 sums of 4.1875, and the last one of 8.25
    assert "lm_head 5041; embedding whole on every rank" in own.stderr
    alone = narrowcast(*arguments, "--dtype", "float32").stdout
    assert "The sea" not in alone and f"==> The sea <==\n{alone}" in own.stdout
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "narrowcast"]
    theirs = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=150, check=True)
    assert len(theirs.stdout.splitlines()) == 1  # one rank prints
    assert theirs.stderr.count("8 tokens: the first after ") == 1


def test_generate_draws_alike_on_all_ranks_and_reports(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("It was a dark\n")
    arguments = "generate", MODEL, "--plan", plan, "--file", tmp_path / "prompt", "--max-new-tokens", 12
    drawn = narrowcast(*arguments, "--temperature", 0.9, "--seed", 3, "--json", tmp_path / "said.json")
    said = json.loads((tmp_path / "said.json").read_text(encoding="utf8"))
    (answer,) = said["answers"]
    assert drawn.stdout == f"{answer['text']}\n" and answer["prompt"] == "It was a dark"
    assert 0 < len(answer["tokens"]) <= 12 and said["tokens_per_s"] > 0 and said["prompt_s"] > 0
    assert said["report"]["bits_per_value"] == pytest.approx(4.4414, abs=1e-3)
    tokens = f"{len(answer['tokens'])} tokens: the first after {said['prompt_s']:.2f} s, then"
    assert tokens in drawn.stderr


def test_generate_wants_a_prompt(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    generate = "generate", MODEL, "--plan", plan
    assert "found nothing. Pass --prompt TEXT, or --file FILE" in refused(*generate)
    assert "found nothing" in refused(*generate, "--prompt", "")
    too_long = refused(*generate, "--prompt", "The sea", "--max-new-tokens", 511)
    assert "prompt and new tokens: expected 512 tokens at most, the model's context" in too_long
    assert "expected a text file, found No such file" in refused(*generate, "--file", tmp_path / "none")
    assert "expected UTF-8 text" in refused(*generate, "--file", tmp_path / "latin")
    assert "expected a model with a chat template" in refused(*generate, "--prompt", "x", "--chat")
    under_torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = narrowcast(*generate, "--file", "-", check=False, **under_torchrun)
    assert "expected a file, which all ranks can read" in done.stderr


def test_inspect_shows_and_draws(plan: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ranges [not markup]"
    shown = narrowcast("inspect", plan, "--plot", picture).stdout
    assert "tp_size 2" in shown and "hidden_size 256" in shown
    rows = [line for line in shown.splitlines() if "self_attn.o_proj" in line and "the largest" not in line]
    assert len(rows) == 16  # eight layers, two hops
    assert all("feature" in row and "4.1875" in row and "…" not in row for row in rows)
    assert shown.count("\n16 sites: ") == 2 and "the largest at " in shown
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "a file that exists" in refused("inspect", plan, "--plot", picture)


def test_inspect_of_codecs_that_calibrate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    arguments = "-tp", 2, "--text", TEXT, "--num-samples", 1, "--max-seq-len", 32
    narrowcast("calibrate", MODEL, *arguments, "-o", path, "--codec", "int2-group32-spike")
    shown = narrowcast("inspect", path).stdout.splitlines()
    rows = [line for line in shown if "self_attn.o_proj" in line and "the largest" not in line]
    assert len(rows) == 16
    assert all("int2-group32-spike" in row and "4.5000" in row and "…" not in row for row in rows)
    assert "Inspect it without --plot." in refused("inspect", path, "--plot", tmp_path / "picture")
    assert not (tmp_path / "picture").exists()


@pytest.mark.parametrize("axes", ["ranks", "blocks", ""])
def test_inspect_of_fitted_codecs_counts_features(tmp_path: Path, axes: str) -> None:
    """Components stand for 256 features: bits are of these, on average over stages those that were asked for."""
    path = tmp_path / "plan"
    arguments = "-tp", 4, "--text", TEXT, "--num-samples", 2, "--max-seq-len", 32, "--dtype", "float32"
    codec = f"transform(bits=2, axes={axes})" if axes else "allocated(bits=2)"
    done = narrowcast("calibrate", MODEL, *arguments, "-o", path, "--codec", codec, check=False)
    assert done.returncode == ("verdict: unusable" in done.stdout)  # of so little text
    shown = narrowcast("inspect", path).stdout
    head, _, tables = shown.partition("Values of the ranks")
    assert (
        ("depth feedback at 0 of 16 sums" in head) == ("a rank's own axes have no place" in head) == (axes == "ranks")
    )
    rows = [line.split() for line in tables.splitlines() if line[:1] == " " and line.strip()[:1].isdigit()]
    assert len(rows) == 32 and "…" not in shown
    assert sum(float(row[-2]) for row in rows) / 32 == pytest.approx(2.0, abs=0.05)
    plan = Plan.load(path)
    for row, (name, site, stage) in zip(
        rows, [(name, site, stage) for stage in (0, 1) for name, site in plan.sites.items()], strict=True
    ):
        assert name.endswith(row[0])
        codec = site.codecs[stage]
        assert row[1] == codec.id
        assert float(row[-2]) == pytest.approx(8 * codec.payload_nbytes(1, 256) / 256, abs=1e-4)
        if isinstance(codec, TransformCodec):
            assert row[2:4] == [codec.axes, str(codec.num_components)]
            assert codec.axes == ("site" if (axes, stage) == ("ranks", 1) else axes)
    assert f"found codecs {codec.id}. Inspect it" in refused("inspect", path, "--plot", tmp_path / "picture")


def test_codecs_lists_what_there_is() -> None:
    rows = {line.split()[0]: line for line in run("codecs").splitlines() if line.strip()}
    assert PRESETS.keys() <= rows.keys()
    assert rows["int4-feature"].split()[1:4] == ["feature(bits=4)", "text", "4.19"]
    assert rows["int4-group128"].split()[1:3] == ["group(bits=4,size=128)", "4.25"], "it needs nothing"
    assert rows["transform"].split()[1:] == ["transform()", "model", "1.50"]


@pytest.mark.parametrize(("load", "warns"), [(0.2, False), (3.1, True)])
def test_doctor_warns_of_more_threads_than_free_cores(
    load: float, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    shown = " ".join(narrowcast("doctor").stdout.split())
    assert ("3 of 4 cores are busy" in shown and "OMP_NUM_THREADS=1" in shown) == warns


def test_threads_do_not_spin_for_long_unless_asked_to() -> None:
    command = [sys.executable, "-c", "import narrowcast, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    for asked, found in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        settings = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | asked
        assert subprocess.check_output(command, env=settings, text=True).strip() == found


def test_doctor() -> None:
    shown = narrowcast("doctor").stdout
    for what in ("narrowcast", "torch", "transformers", "cpu", "kernels on cpu", "gloo"):
        assert what in shown


def test_wrong_paths_and_values_are_one_sentence(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    calibrate = "calibrate", MODEL, "-tp", 2, "--text"
    assert "a file that exists" in refused(*calibrate, TEXT, "-o", plan)
    assert "no such file" in refused(*calibrate, tmp_path / "none.txt", "-o", out)
    assert "Create it" in refused(*calibrate, TEXT, "-o", tmp_path / "no" / "plan")
    assert "a known name, found int99" in refused(*calibrate, TEXT, "-o", out, "--codec", "int99")
    (tmp_path / "empty.txt").write_text("")
    assert "at least two tokens" in refused(*calibrate, tmp_path / "empty.txt", "-o", out)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "UTF-8 text" in refused(*calibrate, tmp_path / "latin.txt", "-o", out)
    assert not out.exists()
    (tmp_path / "mine.txt").write_text("my words")
    assert "a plan to replace" in refused(*calibrate, TEXT, "-o", tmp_path / "mine.txt", "--overwrite")
    assert (tmp_path / "mine.txt").read_text() == "my words"
    assert "no such file" in refused("generate", MODEL, "--plan", out, "--prompt", "x")
    assert "another kind" in refused("inspect", MODEL / "model.safetensors")
    bare = save_random("llama", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).symlink_to(MODEL / name)
    assert "scoring.txt: expected a text file" in refused("evaluate", bare, "--plan", plan)
    (tmp_path / "precious.json").write_text('{"mine": 1}')
    for path, why in ((tmp_path / "precious.json", "an earlier report"), (tmp_path / "no" / "r.json", "Create it")):
        assert why in refused("evaluate", MODEL, "--plan", plan, "--json", path)
    assert (tmp_path / "precious.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    "arguments",
    [["demo", "-tp", "0"], ["demo", "--frobnicate"], ["calibrate"], ["evaluate", str(MODEL)]],
)
def test_wrong_flags_show_the_usage(arguments: list[str]) -> None:
    done = narrowcast(*arguments, check=False)
    assert done.returncode == 2
    assert "Usage" in done.stderr


def test_a_plan_for_another_model_is_refused_before_ranks_start(plan: Path, tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(MODEL / name)
    message = refused("generate", folder, "--plan", plan, "--prompt", "x")
    assert "Calibrate this model." in message and "rank" not in message


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no', name='typer')")
    done = narrowcast("doctor", check=False, PYTHONPATH=str(tmp_path))
    assert done.stderr == "narrowcast: error: typer is not installed: run pip install 'narrowcast[cli]'\n"
    assert done.returncode == 1


def test_without_the_engine_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('no', name='transformers')")
    done = narrowcast(
        "calibrate", MODEL, "-tp", 2, "--text", TEXT, "-o", tmp_path / "p", check=False, PYTHONPATH=str(tmp_path)
    )
    assert "transformers is not installed: run pip install 'narrowcast[transformers]'" in done.stderr


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "narrowcast", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of its ranks, which have just said their first words."""
    assert process.stdout is not None and process.stdout.read(10)
    (server,) = children_of(process.pid, "forkserver")
    ranks = children_of(server)
    assert len(ranks) == 2
    return ranks


def children_of(pid: int, command: str = "") -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", command], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_seconds(pid: int) -> float:
    """Seconds that a process has computed."""
    user, system = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_while_commands_are_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = narrowcast("codecs", check=False, PYTHONPATH=str(tmp_path))
    assert done.stderr == "narrowcast: interrupted; no file was left half-written\n"
    assert done.returncode in INTERRUPTED


@pytest.mark.slow
def test_ctrl_c_ends_all_and_leaves_nothing(plan: Path, tmp_path: Path) -> None:
    calibrating = started("calibrate", MODEL, "-tp", 8, "--text", MODEL / "calibration.txt", "-o", tmp_path / "p")
    while cpu_seconds(calibrating.pid) < 5:  # until well after its imports, on a busy machine too
        time.sleep(0.1)
    os.killpg(calibrating.pid, signal.SIGINT)
    _, errors = calibrating.communicate(timeout=60)
    *progress, last = errors.splitlines()
    assert last == "narrowcast: interrupted; no file was left half-written"
    assert all(line.startswith("narrowcast: ") and line.endswith(" s so far") for line in progress)
    assert calibrating.returncode in INTERRUPTED
    assert list(tmp_path.iterdir()) == []

    generating = started("generate", MODEL, "--plan", plan, "--prompt", "The", "--max-new-tokens", 490)
    ranks = ranks_of(generating)
    os.killpg(generating.pid, signal.SIGINT)
    said, errors = generating.communicate(timeout=60)
    assert said.endswith("\n")  # what was said until then ends as a line
    assert generating.returncode in INTERRUPTED
    assert "narrowcast: interrupted" in errors and "Traceback" not in errors
    assert not any(running(pid) for pid in ranks)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_ranks_behind(plan: Path) -> None:
    generating = started("generate", MODEL, "--plan", plan, "--prompt", "x", "--max-new-tokens", 490)
    ranks = ranks_of(generating)
    generating.kill()
    generating.communicate(timeout=30)  # its ranks would hold the pipes open
    assert not any(running(pid) for pid in ranks)


def test_the_end_of_text_ends_a_continuation(plan: Path, tmp_path: Path) -> None:
    """Llama 3 lists several ends. Which token ends is set to the one that the model says second."""
    arguments = "--plan", plan, "--prompt", "The sea", "--max-new-tokens", 8
    said = narrowcast("generate", MODEL, *arguments).stdout
    tokenizer = load_engine().load_tokenizer(MODEL)
    second = tokenizer(f"The sea{said}").input_ids[len(tokenizer("The sea").input_ids) + 1]
    folder = tmp_path / "model"
    folder.mkdir()
    for path in MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((MODEL / "generation_config.json").read_text(encoding="utf8"))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, second]}))
    ended = narrowcast("generate", folder, *arguments).stdout
    assert said.startswith(ended.rstrip("\n"))
    assert len(tokenizer(f"The sea{ended}".rstrip("\n")).input_ids) == len(tokenizer("The sea").input_ids) + 1


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_is_named(plan: Path) -> None:
    generating = started("generate", MODEL, "--plan", plan, "--prompt", "x", "--max-new-tokens", 490)
    ranks = ranks_of(generating)
    os.kill(max(ranks), signal.SIGKILL)
    _, errors = generating.communicate(timeout=60)
    assert generating.returncode == 1
    assert "narrowcast: error: rank 1 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    assert not any(running(pid) for pid in ranks)
