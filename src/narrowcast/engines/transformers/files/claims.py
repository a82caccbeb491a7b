"""Claims of a config about its files, held against them before anything is made: so many layers, such shapes."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from narrowcast.errors import InvalidInputError
from narrowcast.weights.folders.tensors import read_json

MAX_MODULES = 1 << 12  # of a kind: the engine makes them one by one, a thousand a second
COUNTS = re.compile(r"(layers?|experts)$")  # num_hidden_layers, n_layer, num_local_experts
LAYER = re.compile(r"(?P<list>.+?)\.(?P<number>\d+)\.")  # model.layers.31.mlp.up_proj.weight


def check_counts(config: Path) -> None:
    """InvalidInputError for a config.json with so many layers or experts that making them would not end."""
    for name, value in _numbers(read_json(config)):
        if COUNTS.search(name) and value > MAX_MODULES:
            raise InvalidInputError(
                f"model {config.parent}",
                expected=f"{MAX_MODULES} layers or experts at most",
                found=f"{name} {value}",
                remedy="Copy or download its config again.",
            )


def check_shapes(
    path: str | Path, model: nn.Module, names: Collection[str], shape: Callable[[str], tuple[int, ...]]
) -> None:
    """InvalidInputError for tensors of files that have other shapes than in a skeleton of their config, or no layer."""
    for name, weight in model.state_dict().items():
        if name in names and shape(name) != tuple(weight.shape):
            raise _refusal(path, f"{name} of shape {tuple(weight.shape)}, as its config says", str(shape(name)))
    if (left_out := next(_left_out(model, names), None)) is not None:
        raise _refusal(path, "as many layers in its files as its config says", left_out)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield name, value


def _left_out(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """Tensors of layers that the model would do without, but for those of which the engine knows."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    known = cast(Collection[str] | None, getattr(model, "_keys_to_ignore_on_load_unexpected", None)) or ()
    for name in sorted(names):
        found = LAYER.match(name)
        is_beyond = found and int(found["number"]) >= lists.get(found["list"], math.inf)
        if is_beyond and not any(re.search(pattern, name) for pattern in known):
            yield name


def _refusal(path: str | Path, expected: str, found: str) -> InvalidInputError:
    return InvalidInputError(f"model {path}", expected=expected, found=found, remedy="Copy or download it again.")
