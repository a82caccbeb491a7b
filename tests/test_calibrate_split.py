"""Calibrating a model that is split already, on its ranks: the plan of the whole model, on every rank."""

from collections.abc import Callable
from pathlib import Path

import pytest

import narrowcast
from models import random_ids, save_random
from narrowcast import InvalidInputError
from narrowcast.engines import load_engine
from narrowcast.plan.split import Split
from ranks import Ranks

Pools = Callable[[int], Ranks]
transformers = load_engine()

EVERY_KIND = dict.fromkeys(("sum", "gather", "boundary", "dispatch", "combine", "embedding", "logits"), "int8-feature")


def on_rank(folder: Path, split: Split) -> tuple[str, dict[str, dict[str, float]]]:
    plan = narrowcast.calibrate(
        transformers.load(folder, split=split), [random_ids(2, 20), random_ids(1, 9)], codec=EVERY_KIND
    )
    return plan.fingerprint, {name: dict(site.error) for name, site in plan.sites.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("llama-biased", Split(tp_size=2)),
        ("phi3", Split(tp_size=4)),
        ("gemma2", Split(tp_size=2)),
        ("mixtral", Split(tp_size=2)),
        ("mixtral", Split(tp_size=2, experts="all_to_all")),
        ("qwen3-moe", Split(tp_size=4, experts="all_reduce")),
        ("llama", Split(pp_size=2)),
        ("qwen2", Split(tp_size=2, pp_size=2)),
    ],
    ids=str,
)
def test_ranks_make_the_plan_of_the_whole_model(ranks: Pools, tmp_path: Path, name: str, split: Split) -> None:
    folder = save_random(name, tmp_path / "model")
    plan = narrowcast.calibrate(
        transformers.load(folder),
        [random_ids(2, 20), random_ids(1, 9)],
        codec=EVERY_KIND,
        tp_size=split.tp_size,
        pp_size=split.pp_size,
        experts=split.experts,
    )
    errors = {name: dict(site.error) for name, site in plan.sites.items()}
    for found in ranks(split.world_size).run(on_rank, folder, split):
        assert found == (plan.fingerprint, errors)


def ask_for_another(folder: Path) -> None:
    with pytest.raises(
        InvalidInputError, match="as asked for, tp_size 4, or a whole one, found one split by tp_size 2"
    ):
        narrowcast.calibrate(transformers.load(folder, split=Split(tp_size=2)), [random_ids(1, 8)], tp_size=4)


def test_a_split_model_is_calibrated_as_it_is_split(ranks: Pools, tmp_path: Path) -> None:
    ranks(2).run(ask_for_another, save_random("llama", tmp_path / "model"))
