"""Linear layers: split by rows of the input, whose partial sums travel, or by columns that every rank needs."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from narrowcast.engines.forwards import Forward, add_bias, chunk
from narrowcast.engines.transformers.weights import local
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.wires import Wires


def virtual_rows(name: str, layer: Any, tp_size: int, wires: Wires) -> Forward:
    """Partial sums of all ranks, each from its chunk of the input."""
    chunks = [chunk(layer.weight.shape[1], rank, tp_size) for rank in range(tp_size)]

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        inputs, weights = [x[..., own].contiguous() for own in chunks], [weight[:, own].contiguous() for own in chunks]
        return add_bias(wires.all_reduce_linear(inputs, weights, name), layer.bias)

    return forward


def real_rows(name: str, layer: Any, communicator: Communicator) -> Forward:
    """This rank's partial sum from its chunk of the input."""
    weight, bias = local(layer.weight), None if layer.bias is None else local(layer.bias)

    def forward(x: Tensor) -> Tensor:
        return add_bias(communicator.all_reduce_linear(x, weight, name), bias)

    return forward


def real_rows_of_whole_input(name: str, layer: Any, communicator: Communicator) -> Forward:
    """The same where every rank has the whole input, as after a fused projection."""
    own = chunk(layer.weight.shape[1], communicator.tp.rank, communicator.tp.world_size)
    of_chunk = real_rows(name, layer, communicator)
    return lambda x: of_chunk(x[..., own].contiguous())


def virtual_columns(name: str, layer: Any, tp_size: int, wires: Wires) -> Forward:
    """Columns of all ranks, side by side."""
    chunks = [chunk(layer.weight.shape[0], rank, tp_size) for rank in range(tp_size)]

    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        parts = [functional.linear(x, weight[own], None if bias is None else bias[own]) for own in chunks]
        return wires.all_gather_features(parts, name)

    return forward


def real_columns(name: str, layer: Any, communicator: Communicator) -> Forward:
    """This rank's columns and those of all others."""
    world_size = communicator.tp.world_size
    chunks = [chunk(layer.weight.shape[0], rank, world_size) for rank in range(world_size)]
    num_features = [own.stop - own.start for own in chunks]
    weight, bias = local(layer.weight), None if layer.bias is None else local(layer.bias)

    def forward(x: Tensor) -> Tensor:
        return communicator.all_gather_features(functional.linear(x, weight, bias), name, num_features)

    return forward


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes what ours do: quantized layers, say, do not."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
