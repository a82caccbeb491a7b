"""Linear layers: split by rows of the input, whose partial sums travel, or by columns that every rank needs.

Their weights are tensors, or matrices in few bits (`narrowcast.weights`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from narrowcast.engines.forwards import Forward, add_bias, chunk
from narrowcast.engines.transformers.sharding import chunks, is_packed, own_rows
from narrowcast.runtime.products import Dense, Packed, Product
from narrowcast.runtime.wires import Wires
from narrowcast.weights.layers import local
from narrowcast.weights.products import multiply_dense


def rows(name: str, layer: Any, wires: Wires) -> Forward:
    """The sum of the ranks' products, each with its chunk of the input, which a real rank is given alone."""
    return _rows(name, layer, wires, input_is_whole=wires.virtual)


def rows_of_whole_input(name: str, layer: Any, wires: Wires) -> Forward:
    """The same where every rank has the whole input, as after a fused projection."""
    return _rows(name, layer, wires, input_is_whole=True)


def _rows(name: str, layer: Any, wires: Wires, *, input_is_whole: bool) -> Forward:
    own_parts = chunks(layer.in_features, wires)
    products = [_product_of(name, layer, own, wires, input_is_whole=input_is_whole) for own in own_parts]
    row_parallel = wires.row_parallel(name, products)
    bias = None if layer.bias is None else local(layer.bias)
    return lambda x: add_bias(row_parallel(x), bias)


def _product_of(name: str, layer: Any, own: slice, wires: Wires, *, input_is_whole: bool) -> Product:
    """The product with the input features `own`."""
    columns = own if input_is_whole else None
    if is_packed(layer):
        if wires.virtual:
            layer.matrix.check_columns(name, own, wires.tp_size)
        return Packed(layer.matrix, layer.out_features, columns, own if wires.virtual else slice(None))
    return Dense(_weight_of(layer, own, wires), layer.out_features, columns)


def _weight_of(layer: Any, own: slice, wires: Wires) -> Callable[[], Tensor]:
    """The weights [E, F] of the input features `own`, laid out as on the rank that holds nothing else."""
    if wires.virtual:
        return lambda: layer.weight[:, own].contiguous()
    weight = local(layer.weight)
    return lambda: weight


def columns(name: str, layer: Any, wires: Wires) -> Forward:
    """Columns of all ranks, side by side."""
    size = layer.out_features
    by_rank = [chunk(size, rank, wires.tp_size) for rank in range(wires.tp_size)]
    all_gather = wires.column_parallel(name, [own.stop - own.start for own in by_rank])
    own_columns = _own_columns(layer, chunks(size, wires), wires)
    return lambda x: all_gather(own_columns(wires.inputs(name, x)))


def kept_columns(name: str, layer: Any, wires: Wires) -> Forward:
    """Columns that each rank keeps for itself."""
    own_columns = _own_columns(layer, chunks(layer.out_features, wires), wires)
    return lambda x: own_columns(wires.inputs(name, x))


def asked_at_once(
    name: str, fused: Callable[[Tensor], tuple[Tensor, ...]], wires: Wires
) -> Callable[[Tensor], tuple[Tensor, ...] | None]:
    """The columns of several layers, `name` being one of them, of which each rank keeps its own."""
    if wires.virtual:
        return lambda x: None
    return lambda x: fused(wires.inputs(name, x)[0])


def _own_columns(layer: Any, by_rank: Sequence[slice], wires: Wires) -> Callable[[Sequence[Tensor]], Tensor]:
    """The columns of the ranks that compute here, side by side, each rank's computed from its own input."""
    if is_packed(layer):
        parts = [_packed_columns(layer, own, wires) for own in by_rank]
    else:
        parts = [_dense_columns(layer, own, wires) for own in by_rank]

    def side_by_side(inputs: Sequence[Tensor]) -> Tensor:
        found = [part(x) for part, x in zip(parts, inputs, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    return side_by_side


def _packed_columns(layer: Any, own: slice, wires: Wires) -> Callable[[Tensor], Tensor]:
    bias = None if layer.bias is None else own_rows(layer.bias, own)
    is_whole = layer.matrix.shape[0] == layer.out_features
    held = own if wires.virtual or is_whole else slice(None)
    return lambda x: layer.multiply(x, bias, rows=held, num_tokens=_counted(x, wires))


def _dense_columns(layer: Any, own: slice, wires: Wires) -> Callable[[Tensor], Tensor]:
    if wires.virtual:
        return lambda x: _product(x, layer.weight[own], None if layer.bias is None else layer.bias[own], wires)
    weight, bias = own_rows(layer.weight, own), None if layer.bias is None else own_rows(layer.bias, own)
    return lambda x: _product(x, weight, bias, wires)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, wires: Wires) -> Tensor:
    """As `functional.linear`, of tokens in one matrix; few of them at the memory's rate.

    The last token of each sequence is a view with gaps. PyTorch 2.13 multiplies such a one by a weight that needs no
    gradient as a batch of matrices: 220 ms instead of 4 for one token and 16,000 columns in BF16.
    """
    y_TN = multiply_dense(weight, x.reshape(-1, x.shape[-1]), bias, num_tokens=_counted(x, wires))
    return y_TN.view(*x.shape[:-1], len(weight))


def _counted(x: Tensor, wires: Wires) -> int:
    return wires.counted(math.prod(x.shape[:-1]))
