"""Calibration: the paper's moving averages, whatever the batches and the padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from models import random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.calibration import observe
from narrowcast.calibration.observers import EMA_FACTOR
from narrowcast.codecs import FeatureCodec, FeatureRecipe
from narrowcast.engines import load_engine
from narrowcast.engines.forwards import chunk
from narrowcast.progress import Progress, heard_by

transformers = load_engine()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return transformers.load(save_random("llama-biased", tmp_path_factory.mktemp("model"), torch.float32))


def sequences() -> list[Tensor]:
    return [random_ids(1, length, seed=length) for length in (20, 13, 7, 16, 31)]


def test_ranges_follow_the_paper(model: nn.Module) -> None:
    """Recomputed with forward hooks on the whole layer: partial sums from its input, weight by weight.

    The first of five sequences is held out.
    """
    seen: list[list[Tensor]] = []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, nn.Linear)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pieces = [chunk(layer.in_features, rank, 3) for rank in range(3)]
        seen.append([(inputs[0][0][:, own].double() @ layer.weight[:, own].double().T) for own in pieces])

    handle = layer.register_forward_hook(hook)
    with torch.no_grad():
        for ids in sequences()[1:]:
            model(ids)
    handle.remove()
    low, high = (torch.stack([x.amin(0) for x in seen[0]]), torch.stack([x.amax(0) for x in seen[0]]))
    for partials in seen[1:]:
        low = (1 - EMA_FACTOR) * low + EMA_FACTOR * torch.stack([x.amin(0) for x in partials])
        high = (1 - EMA_FACTOR) * high + EMA_FACTOR * torch.stack([x.amax(0) for x in partials])
    assert EMA_FACTOR == 0.01
    partial, reduced = observe(model, sequences(), tp_size=3).ranges["model.layers.1.mlp.down_proj"]
    # fp32 products of 47 terms (140 = 47 + 47 + 46) against fp64 ones.
    assert torch.allclose(partial.low.double(), low, atol=1e-6)
    assert torch.allclose(partial.high.double(), high, atol=1e-6)
    sums = [torch.stack(partials).sum(0).amax(0) for partials in seen]
    expected = sums[0]
    for each in sums[1:]:
        expected = (1 - EMA_FACTOR) * expected + EMA_FACTOR * each
    assert torch.allclose(reduced.high[0].double(), expected, atol=1e-6)


def batch(ids: list[Tensor], *, left: bool) -> dict[str, Tensor]:
    width = max(each.shape[1] for each in ids)
    rows, masks = [], []
    for each in ids:
        padding = (width - each.shape[1], 0) if left else (0, width - each.shape[1])
        rows.append(nn.functional.pad(each, padding, value=99))
        masks.append(nn.functional.pad(torch.ones_like(each), padding))
    return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks)}


def test_batches_and_padding_do_not_change_the_plan(model: nn.Module) -> None:
    ids = sequences()
    expected = narrowcast.calibrate(model, ids, tp_size=2).fingerprint
    for batches in (
        [batch(ids, left=True)],
        [batch(ids, left=False)],
        [batch(ids[:2], left=True), batch(ids[2:], left=False)],
    ):
        assert narrowcast.calibrate(model, batches, tp_size=2).fingerprint == expected


def test_order_and_text_do_change_the_plan(model: nn.Module) -> None:
    plans = [narrowcast.calibrate(model, ids, tp_size=2) for ids in (sequences(), sequences()[::-1], sequences()[1:])]
    assert len({plan.fingerprint for plan in plans}) == 3


@pytest.mark.parametrize("tp_size", [2, 3, 5, 8, 97])
def test_any_tp_size_also_indivisible(model: nn.Module, tp_size: int) -> None:
    """At 97 some ranks hold nothing: their partial sums are zeros."""
    plan = narrowcast.calibrate(
        model, sequences(), tp_size=tp_size, codec={"sum": "int4-feature", "last": "int4-feature"}
    )
    for site in plan.sites.values():
        partial, reduced = site.codecs
        assert (partial.num_sources, reduced.num_sources) == (tp_size, 1)
        assert isinstance(partial, FeatureCodec)
        assert len(partial.outliers) == 96 // 64
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True):
        assert model(sequences()[0]).logits.isfinite().all()


def test_ways_to_count_the_first_tokens(model: nn.Module) -> None:
    """A first token whose partial sums dwarf all others: it sets scales, only outliers, or neither."""
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[7] *= 50
    ids = [torch.cat([torch.tensor([[7]]), each], dim=1) for each in sequences()]
    try:
        count, choosing, skip, plain = (
            observe(model, text, tp_size=2, first_tokens=way, num_first=1).ranges["model.layers.0.mlp.down_proj"][0]
            for text, way in ((ids, "count"), (ids, "choosing"), (ids, "skip"), (ids, "count"))
        )
    finally:
        with torch.no_grad():
            embedding[7] /= 50
    assert torch.equal(count.low, plain.low)
    assert torch.equal(choosing.width, count.width)
    assert torch.equal(choosing.scale_largest, skip.scale_largest)
    assert torch.equal(count.scale_largest * 2, count.width)
    assert torch.equal(skip.scale_largest * 2, skip.width)
    assert (skip.width <= count.width).all()
    assert (skip.width < count.width).any()


def test_any_number_of_outliers_by_recipe(model: nn.Module) -> None:
    plan = narrowcast.calibrate(model, sequences(), tp_size=2, codec=FeatureRecipe(num_bits=5, num_outliers=7))
    *others, last = plan.feedback.chains[0]
    assert plan.sites[last].codecs[0].id == "group"  # which nothing makes good
    for site in (plan.sites[name] for name in others):
        assert isinstance(site.codecs[0], FeatureCodec)
        assert (site.codecs[0].num_bits, len(site.codecs[0].outliers)) == (5, 7)
    assert plan.calibration["codec"] == "feature(bits=5, outliers=7)"


def forwards_of(model: nn.Module) -> list[Any]:
    return [vars(module).get("forward") for module in model.modules()]


def test_calibration_leaves_the_model_as_it_was(model: nn.Module) -> None:
    forwards = forwards_of(model)
    with torch.no_grad():
        before = model(sequences()[0]).logits
        narrowcast.calibrate(model, sequences(), tp_size=2)
        assert torch.equal(model(sequences()[0]).logits, before)
    assert forwards_of(model) == forwards


def test_dropout_does_not_change_the_plan(model: nn.Module) -> None:
    expected = narrowcast.calibrate(model, sequences(), tp_size=2).fingerprint
    model.train()
    model.config.attention_dropout = 0.5  # type: ignore[union-attr]
    try:
        assert narrowcast.calibrate(model, sequences(), tp_size=2).fingerprint == expected
        assert model.training
    finally:
        model.eval()
        model.config.attention_dropout = 0.0  # type: ignore[union-attr]


def test_an_interrupt_leaves_the_model_as_it_was(model: nn.Module) -> None:
    forwards = forwards_of(model)
    phases = "calibrating", "trying errors", "calibrating under feedback"
    for phase in phases:

        def interrupt(said: object, phase: str = phase) -> None:
            if isinstance(said, Progress) and said.doing == phase and said.done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), heard_by(interrupt):
            narrowcast.calibrate(model, sequences(), tp_size=2)
        assert forwards_of(model) == forwards


def test_expected_errors_are_those_of_the_plan(model: nn.Module) -> None:
    text = sequences()[:1]
    fine, coarse = (
        narrowcast.calibrate(model, text, tp_size=2, codec=f"int{n}-feature", feedback=False) for n in (8, 4)
    )
    for name, site in fine.sites.items():
        assert 0 < site.error["one_shot"] < site.error["two_shot"]
        # 127 / 7 times coarser steps; the sequence that set the ranges clips nothing.
        assert 8 < coarse.sites[name].error["one_shot"] / site.error["one_shot"] < 32


@pytest.mark.parametrize("codec", ["int4-feature", "allocated(bits=3)"])
def test_a_plan_that_is_not_measured_is_the_same_but_for_what_it_says_of_errors(model: nn.Module, codec: str) -> None:
    seen = observe(model, sequences(), tp_size=2, moments="diagonal")
    measured, plan = seen.plan(codec), seen.plan(codec, measured=False)
    assert not any(site.error for site in plan.sites.values()) and "kl_nats" not in plan.calibration
    same = replace(
        plan,
        calibration=measured.calibration,
        sites={name: replace(site, error=measured.sites[name].error) for name, site in plan.sites.items()},
    )
    assert plan.calibration.items() < measured.calibration.items()
    assert same.fingerprint == measured.fingerprint


def test_wrong_input_is_refused(model: nn.Module) -> None:
    with pytest.raises(InvalidInputError, match="at least one sequence"):
        narrowcast.calibrate(model, [], tp_size=2)
    with pytest.raises(InvalidInputError, match="tp_size and pp_size from 1"):
        narrowcast.calibrate(model, sequences(), tp_size=0)
    for alone in ({}, {"tp_size": 1}):
        with pytest.raises(InvalidInputError, match="tp_size or pp_size above 1, found one rank"):
            narrowcast.calibrate(model, sequences(), **alone)
    for wrong_codec in ({"sums": "bf16"}, {"sum": "int99"}):
        with pytest.raises(InvalidInputError, match=r"kinds of sites among .*found sums|a known name, found int99"):
            narrowcast.calibrate(model, sequences(), tp_size=2, codec=wrong_codec)
    with pytest.raises(InvalidInputError, match="each rank from 0 to 3 in one group"):
        narrowcast.calibrate(model, sequences(), tp_size=4, groups=[[0, 1], [1, 2]])
    with pytest.raises(InvalidInputError, match=r"input_ids \[B, T\]"):
        narrowcast.calibrate(model, [torch.ones(3, dtype=torch.long)], tp_size=2)
    for wrong in ([{"input_ids": [[1, 2]]}], {"input_ids": torch.ones(1, 3)}, ["text"]):
        with pytest.raises(InvalidInputError, match="an iterable of tensors"):
            narrowcast.calibrate(model, wrong, tp_size=2)  # type: ignore[arg-type, list-item]
    with pytest.raises(InvalidInputError, match="found '2'"):
        narrowcast.calibrate(model, sequences(), tp_size="2")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="a known name"):
        narrowcast.calibrate(model, sequences(), tp_size=2, codec="int99")
    with pytest.raises(InvalidInputError, match="a model of transformers"):
        narrowcast.calibrate(nn.Linear(3, 3), sequences(), tp_size=2)


def test_partial_sums_that_are_not_finite_are_refused(model: nn.Module) -> None:
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        layer.weight[3, 5] += torch.inf
    try:
        with pytest.raises(InvalidInputError, match=r"model.layers.0.mlp.down_proj: expected finite values"):
            narrowcast.calibrate(model, sequences(), tp_size=2)
    finally:
        with torch.no_grad():
            layer.weight[3, 5] = 0.0


def test_a_plan_says_how_it_was_made(model: nn.Module, tmp_path: Path) -> None:
    plan = narrowcast.calibrate(model, sequences(), tp_size=2, codec="int4-feature")
    plan.save(tmp_path / "plan")
    told = dict(Plan.load(tmp_path / "plan").calibration)
    assert 0 < told.pop("kl_nats") < told.pop("kl_nats_without_feedback") < 0.1
    assert told == {
        "codec": "int4-feature",
        "num_sequences": 4,
        "num_tokens": 67,
        "num_held_out": 1,
        "first_tokens": "count",
        "num_first": 4,
        "ema_factor": EMA_FACTOR,
    }
