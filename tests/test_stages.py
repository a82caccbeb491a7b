"""Pipelines that the engine itself gets wrong: found by a rehearsal, told at once, refused where ranks are real."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.distributed import DistributedConfig

import narrowcast
from commands import run
from models import CONFIGS, MORE, SMALL, random_ids
from narrowcast import InvalidInputError, Plan
from narrowcast.engines import load_engine
from narrowcast.engines.transformers.seam import rehearsal
from narrowcast.plan.split import Split
from ranks import Ranks

Pools = Callable[[int], Ranks]
engine = load_engine()

SCALED = {"embedding_multiplier": 12.0}  # embeddings, and then what the second stage takes for such
WRONG = [
    PhiConfig(**SMALL),
    PhiConfig(),  # as large as the original
    GPTNeoXConfig(**SMALL | {"num_key_value_heads": None}),
    JambaConfig(**SMALL, attn_layer_offset=1, attn_layer_period=2),
    Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    GraniteConfig(**SMALL | SCALED),
]
RIGHT = [*(config() for config in (CONFIGS | MORE).values()), LlamaConfig(), Qwen3MoeConfig(), GraniteConfig(**SMALL)]


def skeleton(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("config", WRONG, ids=lambda config: config.model_type)
def test_stages_that_answer_otherwise_than_the_model_are_in_the_way(config: Any) -> None:
    model, state = skeleton(config), torch.get_rng_state()
    found = engine.obstacle(model, Split(pp_size=2))
    assert found.startswith(f"a small random {type(model).__name__} in 2 stages of Transformers' own: logits ")
    assert engine.obstacle(model, Split(tp_size=2)) == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", RIGHT, ids=lambda config: config.model_type)
def test_stages_that_answer_as_the_model_does_are_not(config: Any) -> None:
    assert engine.obstacle(skeleton(config), Split(pp_size=2)) == ""


def test_a_model_that_cannot_be_made_small_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rehearsal, "MAX_WEIGHTS", 1000)
    with caplog.at_level(logging.WARNING):
        assert engine.obstacle(skeleton(PhiConfig(**SMALL | {"vocab_size": 110})), Split(pp_size=2)) == ""
    assert "found no small PhiForCausalLM on which to try stages" in caplog.text


def refused(folder: Path) -> list[str]:
    """The sentences of loading, and of attaching to what Transformers has loaded by itself."""
    split, told = Split(pp_size=2), []
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2))
    plan = Plan.load(folder / "plan")
    for attempt in (
        lambda: engine.load(folder, split=split),
        lambda: narrowcast.attach(model, plan),
        lambda: narrowcast.calibrate(model, [random_ids(1, 8)]),
    ):
        with pytest.raises(InvalidInputError) as caught:
            attempt()
        told.append(str(caught.value))
    return told


def test_all_ranks_refuse_them(ranks: Pools, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(PhiConfig(**SMALL))
    model.save_pretrained(tmp_path)
    plan = narrowcast.calibrate(model, [random_ids(1, 8)], tp_size=1, pp_size=2, codec="fp8")
    assert plan.simulated_only
    del plan.calibration["simulated_only"]  # as a plan of before has none
    plan.save(tmp_path / "plan")
    first, second = ranks(2).run(refused, tmp_path)
    assert first == second
    for told in first:
        assert told.startswith(
            "pp_size 2: expected stages that answer as the whole model does, found a small random Phi"
        )
        assert told.endswith("Split this model by tp_size alone: its pipeline in Transformers is wrong.")


def test_commands_say_so(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(PhiConfig(**SMALL))
    model.save_pretrained(tmp_path)
    told = " ".join(run("estimate", tmp_path, "-tp", 1, "-pp", 2, "--input-len", 8).split())
    assert "no ranks can be split so: a small random PhiForCausalLM in 2 stages" in told
