"""Opaque operators, which engines call and compiled graphs keep whole: the product, the decision and the sum inside.

Each takes the name of its site and the handle of the wires that it belongs to. What travels from one sum to the next,
the residue of `runtime.feedback`, is an argument that the schema declares as mutated: nothing else does.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from narrowcast.runtime.wires import Wires

_library = torch.library.Library("narrowcast", "DEF")
_numbers = itertools.count()
_wires: "WeakValueDictionary[int, Wires]" = WeakValueDictionary()
_runs: dict[str, Callable[..., Tensor]] = {}


def register(wires: "Wires") -> int:
    """The handle under which operators find `wires`, as long as these live."""
    handle = next(_numbers)
    _wires[handle] = wires
    return handle


@dataclass(frozen=True)
class Operator:
    """An operator at a site of `wires`, which live as long as it does. `adds_up`: it is one of a sum."""

    name: str
    site: str
    wires: "Wires"
    adds_up: bool = field(default=True, kw_only=True)

    def __call__(self, x: Tensor) -> Tensor:
        carried: list[Tensor | None] = [self._residue(x)] if self.adds_up else []
        if type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling():
            return _runs[self.name](x, *carried, self.site, self.wires.handle)  # 1 us; through the dispatcher 10
        # Inductor (2.13) fails on an optional argument that is mutated: an empty tensor is none.
        given = (x.new_empty(0) if each is None else each for each in carried)
        result: Tensor = getattr(torch.ops.narrowcast, self.name)(x, *given, self.site, self.wires.handle)
        return result

    def _residue(self, x: Tensor) -> Tensor | None:
        shape, num_features = x.shape, x.shape[-1]
        if self.name == "row_parallel":
            num_features = self.wires.products(self.site)[0].num_features
        elif self.wires.virtual:
            shape = shape[1:]
        return self.wires.residue(self.site, math.prod(shape[:-1]), num_features, x.device)


def _define(schema: str, run: Callable[..., Tensor], shape: Callable[..., Tensor]) -> None:
    name = schema.partition("(")[0]
    _runs[name] = run
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, shape, "Meta")


def _row_parallel(tokens: Tensor, residue: Tensor | None, site: str, handle: int) -> Tensor:
    return _wires[handle].sum_products(tokens, site, _if_any(residue))


def _if_any(residue: Tensor | None) -> Tensor | None:
    return residue if residue is not None and residue.numel() else None


def _row_parallel_shape(tokens: Tensor, residue: Tensor | None, site: str, handle: int) -> Tensor:
    product = _wires[handle].products(site)[0]
    return tokens.new_empty(*tokens.shape[:-1], product.num_features, dtype=product.dtype or tokens.dtype)


def _all_reduce(x: Tensor, residue: Tensor | None, site: str, handle: int) -> Tensor:
    wires = _wires[handle]
    return wires.sum(x.unbind() if wires.virtual else [x], site, _if_any(residue))


def _all_reduce_shape(x: Tensor, residue: Tensor | None, site: str, handle: int) -> Tensor:
    return x.new_empty(x.shape[1:] if _wires[handle].virtual else x.shape)


def _all_gather(x: Tensor, site: str, handle: int) -> Tensor:
    wires = _wires[handle]
    parts = x.split(list(wires.columns(site)), dim=-1) if wires.virtual else [x]
    return wires.gather_features(parts, site)


def _all_gather_shape(x: Tensor, site: str, handle: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(_wires[handle].columns(site)))


_define(
    "row_parallel(Tensor tokens, Tensor(a!) residue, str site, int handle) -> Tensor",
    _row_parallel,
    _row_parallel_shape,
)
_define("all_reduce(Tensor x, Tensor(a!) residue, str site, int handle) -> Tensor", _all_reduce, _all_reduce_shape)
_define("all_gather(Tensor x, str site, int handle) -> Tensor", _all_gather, _all_gather_shape)
