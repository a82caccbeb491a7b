"""Plans with a right hash whose contents are not: every field of one is changed, and none is taken for what it is not.

A changed plan is refused when it is read, or when it is attached to the model that it is not for; or it is another
plan, and works. No other error, no hang.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import narrowcast
from models import random_ids, save_random
from narrowcast import Plan
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError, PlanFormatError, PlanMismatchError
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.plan import _digest
from narrowcast.plan.split import MAX_RANKS, Split

GONE: Any = object()
ODD = [None, -1, 0, 1.5, True, 2**31, 2**70, float("inf"), float("nan"), "x", "", [], {}, [1], {"a": 1}, GONE]
TABLES = Decisions(
    coded={96: ((1, Choice.parse("coded one_shot")), (8, Choice.parse("plain two_shot")))},
    plain={96: ((1, Choice.parse("native")),)},
    transport="tcp",
    waits={96: ((1, 0.1), (4, 0.2))},
    weights_gbps=3.0,
    logits_s=0.1,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_engine().load(save_random("llama", tmp_path_factory.mktemp("model")))


def a_plan(model: nn.Module, codec: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of one with everything that a plan can have."""
    groups = [] if codec.startswith("transform") else [[0, 1], [2, 3]]
    plan = narrowcast.calibrate(model, [random_ids(2, 40)], tp_size=4, codec=codec, groups=groups)
    header, tensors = replace(plan, decisions=TABLES)._contents()
    return json.loads(header), tensors


def hashed(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    text = json.dumps(header)
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contents, {"narrowcast": text, "sha256": _digest(text, contents)})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all fields and items; of a list's items the first."""
    if path:
        yield path
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(header: dict[str, Any], path: tuple[Any, ...], new: object) -> dict[str, Any]:
    found = at = copy.deepcopy(header)
    for key in path[:-1]:
        at = at[key]
    if new is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return found


def odd(tensor: Tensor) -> Iterator[Tensor]:
    """Of another dtype, another shape, and with values that are none of its kind."""
    real = tensor.is_floating_point()
    yield from (tensor.float() if real else tensor.long() + 100_000, tensor.double())
    yield from (tensor[:-1], tensor[:0], tensor[..., :-1], tensor.flatten(), tensor[None], torch.cat([tensor, tensor]))
    yield from (torch.zeros_like(tensor), torch.full_like(tensor, torch.nan if real else 127))
    yield from (-tensor, torch.full_like(tensor, torch.inf)) if real else (tensor.flip(-1),)


@torch.no_grad()
def accepted(model: nn.Module, data: bytes) -> bool:
    """True if this plan works; False if it is refused, as it is to be."""
    try:
        plan = Plan.from_bytes(data, "memory")
    except PlanFormatError:
        return False
    try:
        with narrowcast.attach(model, plan, simulate=True):
            model(random_ids(1, 12))
    except (PlanMismatchError, InvalidInputError):
        return False
    return True


@pytest.fixture(scope="module")
def seen() -> set[tuple[Any, ...]]:
    """Fields that were changed, in a plan of one codec where they do not depend on it."""
    return set()


@pytest.mark.parametrize("codec", ["int4-feature", "allocated(bits=4)", "transform(bits=1.5, axes=site)", "mxfp4"])
def test_every_field_and_tensor_is_looked_at(model: nn.Module, codec: str, seen: set[tuple[Any, ...]]) -> None:
    header, tensors = a_plan(model, codec)
    assert accepted(model, hashed(header, tensors))
    num_seen, num_refused = len(seen), 0
    for path in places(header):
        kind = tuple("*" if isinstance(key, int) or "layers" in key else key for key in path)
        kind = (codec, *kind) if "sites" in kind else kind
        if kind in seen or (path[:2] == ("model", "samples") and len(path) > 3):
            continue
        seen.add(kind)
        num_refused += sum(not accepted(model, hashed(changed(header, path, new), tensors)) for new in ODD)
    assert num_refused > 10 * (len(seen) - num_seen)
    kinds = {name.rpartition("/")[2]: name for name in tensors}
    for name in kinds.values():
        for new in odd(tensors[name]):
            accepted(model, hashed(header, {**tensors, name: new}))
        assert not accepted(model, hashed(header, {key: each for key, each in tensors.items() if key != name}))
    assert not accepted(model, hashed(header, {**tensors, "more": torch.ones(1)}))


@pytest.mark.parametrize(
    ("path", "new", "told"),
    [
        (("split", "tp_size"), 2**31, f"split.tp_size: expected an integer from 1 to {MAX_RANKS}"),
        (("groups",), [[0, 1], [1, 3]], "groups: expected each rank below 4 in one of them"),
        (("decisions", "coded", "96"), [[8, "native"], [4, "native"]], "ascending numbers of tokens"),
        (("decisions", "coded", "96"), [[1, "coded three_shot"]], "three_shot"),
        (("decisions", "weights_gbps"), 0, "decisions.weights_gbps: expected more than 0, beside waits"),
        (("feedback", "chains"), [["lm_head"]], "feedback.chains: expected sums of the plan, found 'lm_head'"),
        (("sites", "model.layers.0.mlp.down_proj", "kind"), "logits", "stages: expected 1, found '3'"),
    ],
)
def test_the_error_names_the_field(model: nn.Module, path: tuple[Any, ...], new: object, told: str) -> None:
    header, tensors = a_plan(model, "int4-feature")
    with pytest.raises(PlanFormatError) as refused:
        Plan.from_bytes(hashed(changed(header, path, new), tensors), Path("p.plan"))
    assert told in str(refused.value) and "p.plan" in str(refused.value)


def test_a_split_has_so_many_ranks_at_most() -> None:
    with pytest.raises(InvalidInputError, match=f"from 1 to {MAX_RANKS}"):
        Split(tp_size=MAX_RANKS + 1)
    with pytest.raises(InvalidInputError, match="from 1"):
        Split(tp_size=True)


def test_a_plan_of_other_features_leaves_the_model_as_it_was(model: nn.Module) -> None:
    header, tensors = a_plan(model, "int4-feature")
    kept = {name: dict(vars(module)) for name, module in model.named_modules()}
    cut = {name: tensor[..., :-1] if name.endswith("/scale") else tensor for name, tensor in tensors.items()}
    with pytest.raises(PlanMismatchError, match="expected codecs of 96 features, as the model has, found 95"):
        narrowcast.attach(model, Plan.from_bytes(hashed(header, cut), "p"), simulate=True)
    assert kept == {name: dict(vars(module)) for name, module in model.named_modules()}
