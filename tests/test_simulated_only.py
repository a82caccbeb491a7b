"""Splits that no ranks can have, as heads do not share out: told at once, simulated, refused where ranks are real."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

import narrowcast
from commands import refused, run
from conftest import MODEL
from models import SMALL, random_ids
from narrowcast import InvalidInputError, Plan
from narrowcast.engines import load_engine
from narrowcast.plan.split import Split

NINE = "9 heads, 3 KV heads: 1 or 3 ranks"


def test_the_sizes_that_fit_are_told() -> None:
    engine = load_engine()
    heads = {"hidden_size": 90, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | heads))
    assert engine.obstacle(model, Split(tp_size=2)) == NINE
    assert engine.obstacle(model, Split(tp_size=3)) == ""
    plan = narrowcast.calibrate(model, [random_ids(1, 16)], tp_size=2, codec="fp8")
    assert plan.simulated_only == NINE
    with pytest.raises(InvalidInputError, match=f"simulated only .{NINE}"):
        plan.check_real()
    assert narrowcast.calibrate(model, [random_ids(1, 16)], tp_size=3, codec="fp8").simulated_only == ""


def test_commands_say_so(tmp_path: Path) -> None:
    """The bundled model has eight heads."""
    fitting, path, text = "8 heads, 8 KV heads: 1, 2, 4 or 8 ranks", tmp_path / "plan", MODEL / "calibration.txt"
    short = "--text", text, "--num-samples", 2, "--max-seq-len", 32
    assert f"no ranks can be split so: {fitting}" in run("estimate", MODEL, "-tp", 3)
    assert f"simulated only: {fitting}" in run("calibrate", MODEL, "-tp", 3, "--codec", "fp8", "-o", path, *short)
    assert Plan.load(path).simulated_only == fitting
    assert f"simulated_only {fitting}" in " ".join(run("inspect", path).split())
    assert "simulated only" in " ".join(run("evaluate", MODEL, "--plan", path, *short).split())
    for command in (("generate", MODEL, "--prompt", "It"), ("evaluate", MODEL, "--real", *short)):
        assert f"simulated only ({fitting})" in refused(*command, "--plan", path)
    assert "KV heads: 1" in refused("demo", "-tp", 5)
