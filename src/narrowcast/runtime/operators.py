"""Opaque operators, which engines call and compiled graphs keep whole: the product, the decision and the sum inside.

Each takes the name of its site and the handle of the wires that it belongs to. Nothing but tensors travels from one
call to the next: state that does will be an argument that the schema declares as mutated.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from narrowcast.runtime.wires import Wires

_library = torch.library.Library("narrowcast", "DEF")
_numbers = itertools.count()
_wires: "WeakValueDictionary[int, Wires]" = WeakValueDictionary()
_runs: dict[str, Callable[[Tensor, str, int], Tensor]] = {}


def register(wires: "Wires") -> int:
    """The handle under which operators find `wires`, as long as these live."""
    handle = next(_numbers)
    _wires[handle] = wires
    return handle


@dataclass(frozen=True)
class Operator:
    """An operator at a site of `wires`, which live as long as it does."""

    name: str
    site: str
    wires: "Wires"

    def __call__(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling():
            return _runs[self.name](x, self.site, self.wires.handle)  # 1 us; through the dispatcher 10
        result: Tensor = getattr(torch.ops.narrowcast, self.name)(x, self.site, self.wires.handle)
        return result


def _define(name: str, run: Callable[[Tensor, str, int], Tensor], shape: Callable[[Tensor, str, int], Tensor]) -> None:
    argument = "tokens" if name == "row_parallel" else "x"
    _runs[name] = run
    _library.define(f"{name}(Tensor {argument}, str site, int handle) -> Tensor")
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, shape, "Meta")


def _row_parallel(tokens: Tensor, site: str, handle: int) -> Tensor:
    return _wires[handle].sum_products(tokens, site)


def _row_parallel_shape(tokens: Tensor, site: str, handle: int) -> Tensor:
    product = _wires[handle].products(site)[0]
    return tokens.new_empty(*tokens.shape[:-1], product.num_features, dtype=product.dtype or tokens.dtype)


def _all_reduce(x: Tensor, site: str, handle: int) -> Tensor:
    wires = _wires[handle]
    return wires.sum(x.unbind() if wires.virtual else [x], site)


def _all_reduce_shape(x: Tensor, site: str, handle: int) -> Tensor:
    return x.new_empty(x.shape[1:] if _wires[handle].virtual else x.shape)


def _all_gather(x: Tensor, site: str, handle: int) -> Tensor:
    wires = _wires[handle]
    parts = x.split(list(wires.columns(site)), dim=-1) if wires.virtual else [x]
    return wires.gather_features(parts, site)


def _all_gather_shape(x: Tensor, site: str, handle: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(_wires[handle].columns(site)))


_define("row_parallel", _row_parallel, _row_parallel_shape)
_define("all_reduce", _all_reduce, _all_reduce_shape)
_define("all_gather", _all_gather, _all_gather_shape)
