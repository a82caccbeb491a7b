"""vLLM does not start where a plan does not fit, and says why in a sentence."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from narrowcast.engines.vllm.settings import Settings, misspelt
from narrowcast.errors import InvalidInputError, PlanFormatError, PlanMismatchError
from narrowcast.plan import Plan
from running import ENVIRONMENT, LIMIT_S, MODEL, free_port, started

# --- What is asked for: no vLLM needed --------------------------------------------------------------------------------


def test_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWCAST_PLAN", "")
    assert Settings.of({}) is None
    assert Settings.of({"of another plug-in": 1}) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"plan": "no such file"}, "plan no such file: expected a plan file, found no such file"),
        ({"codec": "int4-feature"}, "codec int4-feature: expected one that needs no calibration"),
        ({"codec": "int5"}, "codec: expected a known name, found int5"),
        (
            {"plan": "a", "codec": "int8-group128"},
            "found plan a and codec int8-group128. Set NARROWCAST_PLAN",
        ),
        ({"plans": "a"}, "additional_config, narrowcast: expected"),
        ({"codec": "fp8", "tune": True}, "found codec fp8 and tune True"),
        ({"calibrate": "new", "plan": "a"}, "found calibrate new and plan a"),
        (
            {"calibrate": "new", "calibrate_tokens": 0},
            "NARROWCAST_CALIBRATE_TOKENS: expected a number of tokens, found 0",
        ),
        ({"calibrate": "new", "sample_every": 9}, "found calibrate new and sample_every 9"),
        ({"codec": "fp8", "sample_every": -1}, "NARROWCAST_SAMPLE_EVERY: expected calls of a site, of which one"),
        (
            {"codec": "fp8", "metrics_port": 70000},
            "NARROWCAST_METRICS_PORT: expected a port from 1 to 65000, found 70000",
        ),
        ("a", "additional_config, narrowcast: expected"),
    ],
)
def test_what_cannot_be_used_is_refused(given: object, expected: str) -> None:
    with pytest.raises((InvalidInputError, PlanFormatError), match=expected):
        Settings.of({"narrowcast": given})


def test_the_environment_and_the_configuration_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWCAST_CODEC", "int8-group128")
    assert Settings.of({}) is not None
    with pytest.raises(InvalidInputError, match="found codec fp8 and codec int8-group128"):
        Settings.of({"narrowcast": {"codec": "fp8"}})


def test_a_variable_that_is_nearly_one_of_ours() -> None:
    found = misspelt({"NARROWCAST_PLANS": "a", "NARROWCAST_PLAN": "b", "NARROWCAST_API_KEY": "c", "VLLM_PLAN": "d"})
    assert list(found) == [("NARROWCAST_PLANS", "NARROWCAST_PLAN")]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", MODEL], 1, ["narrowcast: error: plan missing.plan: expected a plan file, found no such file"]),
        (["--help"], 0, ["plan missing.plan: expected a plan file", "usage: vllm"]),
    ],
)
def test_a_mistake_ends_a_server_with_a_sentence_and_no_other_command(
    served_by_vllm: None, arguments: list[str], status: int, said: list[str]
) -> None:
    vllm = Path(sys.executable).with_name("vllm")
    environment = os.environ | ENVIRONMENT | {"NARROWCAST_PLAN": "missing.plan"}
    done = subprocess.run([vllm, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == status
    assert all(each in done.stdout + done.stderr for each in said)
    assert "Traceback" not in done.stderr


# --- What ranks find: vLLM on this machine ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "plan", "expected"),
    [
        ({}, "missing.plan", "expected a plan file, found no such file"),
        ({"tp_size": 1}, "int4.plan", "plan: expected tp_size 2, for which it was calibrated, found tp_size 1"),
        (
            {"options": {"pipeline_parallel_size": 2}},
            "int4.plan",
            "plan: expected tp_size 2, for which it was calibrated, found tp_size 2, pp_size 2",
        ),
        (
            {"model": "other"},
            "int4.plan",
            "expected the weights that the plan was calibrated on in model.layers.3.self_attn.o_proj, found others",
        ),
    ],
)
def test_a_plan_that_does_not_fit(folder: Path, asked: dict[str, object], plan: str, expected: str) -> None:
    if "model" in asked:
        asked = asked | {"model": str(folder / "other")}
    environment = {"NARROWCAST_PLAN": str(folder / plan)}
    code, run = started(folder, "refused", {"model": MODEL, "eager": True, "served": True, **asked}, environment)
    assert code != 0
    assert expected in run.log
    assert not run.out.exists()


def test_stages_that_end_elsewhere_than_the_plans(folder: Path) -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    from narrowcast.engines.vllm.model import LoadedModel

    stage = nn.Module()
    stage.model = nn.Module()
    stage.model.layers = nn.ModuleList([*(nn.Module() for _ in range(5)), *(PPMissingLayer() for _ in range(3))])
    expected = (
        "stages that end where its chains of feedback do, such as at model.layers.7.mlp.down_proj, found "
        "model.layers.5.self_attn.o_proj and other sums of its chain in different ones. Set VLLM_PP_LAYER_PARTITION"
    )
    with pytest.raises(PlanMismatchError, match=expected):
        LoadedModel(stage, {}).served(Plan.load(folder / "stages.plan"))


@pytest.mark.parametrize(
    ("theirs", "sampling", "expected"),
    [
        ("group.plan", {}, "plan of rank 1: expected that of rank 0"),
        (
            "int4.plan",
            {"NARROWCAST_SAMPLE_EVERY": "0"},
            "sample_every of rank 1: expected that of rank 0, 1000, found 0",
        ),
        ("", {}, "rank 1: expected one that narrowcast serves, as this one, found none in 60 s"),
    ],
)
def test_nodes_that_are_asked_for_different_things(
    folder: Path, theirs: str, sampling: dict[str, str], expected: str
) -> None:
    """Two nodes on this host: another plan on one, or none, or other sums to be sampled."""
    common = f"serve {MODEL} --tensor-parallel-size 2 --nnodes 2 --master-addr 127.0.0.1 --master-port {free_port()}"
    options = [*common.split(), "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    vllm = Path(sys.executable).with_name("vllm")
    nodes, logs = [], []
    for rank, plan in enumerate(("int4.plan", theirs)):
        own = ["--port", str(free_port())] if rank == 0 else ["--headless"]
        environment = {"NARROWCAST_PLAN": str(folder / plan) if plan else "", "VLLM_CPU_OMP_THREADS_BIND": str(rank)}
        logs.append(folder / f"node{rank}.log")
        with logs[-1].open("w") as log:
            nodes.append(
                subprocess.Popen(
                    [vllm, *options, "--node-rank", str(rank), *own],
                    env=os.environ | ENVIRONMENT | environment | (sampling if rank else {}),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        assert all(node.wait(LIMIT_S) != 0 for node in nodes)
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert expected in logs[0].read_text()
