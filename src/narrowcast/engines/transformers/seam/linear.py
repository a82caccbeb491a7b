"""Linear layers: split by rows of the input, whose partial sums travel, or by columns that every rank needs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.engines.forwards import Forward, add_bias, chunk
from narrowcast.engines.transformers.sharding import chunks, local, own_rows
from narrowcast.runtime.products import Dense
from narrowcast.runtime.wires import Wires


def rows(name: str, layer: Any, wires: Wires) -> Forward:
    """The sum of the ranks' products, each with its chunk of the input, which a real rank is given alone."""
    return _rows(name, layer, wires, input_is_whole=wires.virtual)


def rows_of_whole_input(name: str, layer: Any, wires: Wires) -> Forward:
    """The same where every rank has the whole input, as after a fused projection."""
    return _rows(name, layer, wires, input_is_whole=True)


def _rows(name: str, layer: Any, wires: Wires, *, input_is_whole: bool) -> Forward:
    num_features, num_inputs = layer.weight.shape
    products = [
        Dense(_weight_of(layer, own, wires), num_features, own if input_is_whole else None)
        for own in chunks(num_inputs, wires)
    ]
    row_parallel = wires.row_parallel(name, products)
    bias = None if layer.bias is None else local(layer.bias)
    return lambda x: add_bias(row_parallel(x), bias)


def _weight_of(layer: Any, own: slice, wires: Wires) -> Callable[[], Tensor]:
    """The weights [E, F] of the input features `own`, laid out as on the rank that holds nothing else."""
    if wires.virtual:
        return lambda: layer.weight[:, own].contiguous()
    weight = local(layer.weight)
    return lambda: weight


def columns(name: str, layer: Any, wires: Wires) -> Forward:
    """Columns of all ranks, side by side."""
    size, (weight, bias) = layer.weight.shape[0], (layer.weight, layer.bias)
    by_rank = [chunk(size, rank, wires.tp_size) for rank in range(wires.tp_size)]
    all_gather = wires.column_parallel(name, [own.stop - own.start for own in by_rank])
    if not wires.virtual:
        (own,) = chunks(size, wires)
        weight, bias = own_rows(weight, own), None if bias is None else own_rows(bias, own)
        return lambda x: all_gather(_product(wires.inputs(name, x)[0], weight, bias))
    return lambda x: all_gather(_own_columns(layer, wires.inputs(name, x), by_rank))


def kept_columns(name: str, layer: Any, wires: Wires) -> Forward:
    """Columns that each rank keeps for itself."""
    if not wires.virtual:
        forward = layer.forward
        return lambda x: forward(wires.inputs(name, x)[0])
    by_rank = chunks(layer.weight.shape[0], wires)
    return lambda x: _own_columns(layer, wires.inputs(name, x), by_rank)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `functional.linear`, of tokens in one matrix.

    The last token of each sequence is a view with gaps. PyTorch 2.13 multiplies such a one by a weight that needs no
    gradient as a batch of matrices: 220 ms instead of 4 for one token and 16,000 columns in BF16.
    """
    return functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _own_columns(layer: Any, inputs: Sequence[Tensor], by_rank: Sequence[slice]) -> Tensor:
    """The columns of all ranks side by side, each rank's computed from its own input."""
    weight, bias = layer.weight, layer.bias
    parts = [
        _product(x, weight[own], None if bias is None else bias[own]) for x, own in zip(inputs, by_rank, strict=True)
    ]
    return torch.cat(parts, dim=-1)
