"""Decoder layers of a whole model that run as they were recorded: the bits of the modules, and when they do not."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from models import random_ids
from narrowcast.codecs import kernels
from narrowcast.codecs.kernels import cpu
from narrowcast.engines import load_engine
from narrowcast.runtime.schedules import _combined
from stepping import CONFIGS, NUM_LAYERS, NUM_STEPS, by_modules, counted, same, steps

pytestmark = pytest.mark.skipif(cpu.native is None, reason="layers are recorded for the compiled module")

FIRST = 1  # step, in which caches get room to grow in


def loaded(folder: Path, name: str = "llama", weights: Any = "dense") -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]()).bfloat16().save_pretrained(folder)
    return load_engine().load(folder, weights=weights)


@pytest.mark.parametrize("weights", ["dense", "int4-group32"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("texts", [(1, 0), (3, 0), (2, 4)])
def test_steps_have_the_bits_of_the_modules(tmp_path: Path, name: str, weights: str, texts: tuple[int, int]) -> None:
    """Of texts of one length, and of a padded one, which comes with a mask of all places."""
    model = loaded(tmp_path, name, weights)
    with by_modules():
        expected = steps(model, *texts)
    with counted() as runs:
        assert same(steps(model, *texts), expected)
    assert runs[0] == NUM_LAYERS * (NUM_STEPS - 2 * FIRST)


@pytest.mark.parametrize("num_values", [64, 96])
def test_gelu_is_recorded_where_all_of_it_is_computed_in_vectors(num_values: int) -> None:
    """One by one, PyTorch rounds some values otherwise."""
    x, gelu = torch.randn(2, 128).bfloat16()[:, :num_values], torch.ops.aten.gelu.default
    assert bool(_combined(gelu, (x,), {}, gelu(x))) == (num_values % 64 == 0)


def change_forward(layer: Any) -> None:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x) * 2


def change_module(layer: Any) -> None:
    layer.mlp.act_fn = nn.Identity()


def change_weight(layer: Any) -> None:
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2


def change_weight_in_place(layer: Any) -> None:
    layer.mlp.down_proj.weight.data.mul_(2)


@pytest.mark.parametrize("change", [change_forward, change_module, change_weight, change_weight_in_place])
def test_what_is_changed_in_a_layer_counts(tmp_path: Path, change: Callable[[Any], None]) -> None:
    model = loaded(tmp_path)
    before = steps(model)
    change(model.model.layers[1])
    ours = steps(model)
    with by_modules():
        assert same(ours, steps(copy.deepcopy(model)))
    assert not same(ours, before)


class Adapter(nn.Module):
    """As fine-tuned models have it: what it does depends on a switch of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.on = layer, False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + y if self.on else y


def test_modules_of_others_may_change_their_mind(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = adapter = Adapter(mlp.down_proj)
    off = steps(model)
    adapter.on = True
    assert not same(steps(model), off)


def test_forwards_of_others_are_called_for_each_token(tmp_path: Path) -> None:
    model, seen = loaded(tmp_path), []
    down_proj = model.model.layers[0].mlp.down_proj
    forward = down_proj.forward
    down_proj.forward = lambda x: (seen.append(x), forward(x))[1]
    with counted() as runs:
        steps(model)
    assert len(seen) == 1 + NUM_STEPS
    assert runs[0] == NUM_STEPS - 2 * FIRST, "of the other layer"


def test_a_copy_has_weights_of_its_own(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    expected = steps(model)
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data.mul_(1.5)
    with counted() as runs:
        found = steps(other)
    assert runs[0] == NUM_LAYERS * (NUM_STEPS - 2 * FIRST)
    assert not same(found, expected)
    assert same(steps(model), expected)


def test_a_model_that_nobody_has_any_more_is_gone(tmp_path: Path) -> None:
    """At once, as it is large: not when the garbage collector comes by."""
    model = loaded(tmp_path)
    steps(model)
    weight = weakref.ref(model.lm_head.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_model_can_be_pickled(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    expected = steps(model)
    assert same(steps(pickle.loads(pickle.dumps(model))), expected)


def test_threads_do_not_meet_in_what_is_recorded(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    expected, found = [steps(model, 1), steps(model, 2)], {}

    def run(place: int) -> None:
        found[place] = [same(steps(model, 1 + place % 2), expected[place % 2]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(alike) for alike in found.values()) and len(found) == 4


def test_a_simulation_is_not_recorded(tmp_path: Path) -> None:
    """Its sums have no native calls, and all that it counts would be lost."""
    model = loaded(tmp_path)
    expected = steps(model)
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], codec="int4-feature", tp_size=2)
    with counted() as runs, narrowcast.attach(model, plan, simulate=True) as handle:
        steps(model)
        report = handle.report()
    with by_modules(), narrowcast.attach(model, plan, simulate=True) as handle:
        steps(model)
    assert runs[0] == 0 and report == handle.report()
    with counted() as runs:
        assert same(steps(model), expected)
    assert runs[0]


def test_who_wants_the_modules_has_them(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    expected = steps(model)
    with counted() as runs, kernels.forced("reference"):
        steps(model)
    assert runs[0] == 0
    seen: list[Any] = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with counted() as runs:
        assert same(steps(model), expected)
    assert len(seen) == 1 + NUM_STEPS and runs[0] == NUM_STEPS, "the layer without a hook"
    hook.remove()
    with counted() as runs:
        model.set_attn_implementation("sdpa")
        steps(model)
    assert runs[0] == 0
