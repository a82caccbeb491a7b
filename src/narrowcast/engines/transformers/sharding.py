"""Parts of weights that ranks hold, and modules whose weights we know."""

import inspect
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from narrowcast.engines.forwards import chunk
from narrowcast.errors import InvalidInputError
from narrowcast.runtime.wires import Wires
from narrowcast.weights.experts import JOINED, PackedExperts
from narrowcast.weights.layers import DenseLinear, PackedEmbedding, PackedLinear, local

EXPERT_WEIGHTS = JOINED.keys()  # [X, 2 * I, E] and [X, E, I] for X experts of I hidden features


def own_chunk(weight: Tensor, axis: int) -> slice:
    """The part of a weight's `axis` that this rank holds: all of it unless the weight is split there."""
    if isinstance(weight, DTensor):
        (placement,) = weight.placements
        if isinstance(placement, Shard) and placement.dim % weight.ndim == axis:
            return chunk(weight.shape[axis], weight.device_mesh.get_local_rank(), weight.device_mesh.size())
    return slice(0, weight.shape[axis])


def own_runs(weight: Tensor, axis: int) -> list[tuple[int, int]]:
    """Where the parts of a weight's `axis` begin that this rank holds, and their sizes: one of each kind of features.

    There are several kinds where such as gate and up lie behind each other in a weight that is split.
    """
    own, num_kinds = own_chunk(weight, axis), 1
    if isinstance(weight, DTensor):
        (placement,) = weight.placements
        if isinstance(placement, _StridedShard) and placement.dim % weight.ndim == axis:
            num_kinds = int(placement.split_factor)
            own = chunk(weight.shape[axis] // num_kinds, weight.device_mesh.get_local_rank(), weight.device_mesh.size())
    size = weight.shape[axis] // num_kinds
    return [(kind * size + own.start, own.stop - own.start) for kind in range(num_kinds)]


def own_rows(weight: Tensor, own: slice) -> Tensor:
    """The rows `own` of a weight, of which this rank holds these or all."""
    return weight.to_local() if isinstance(weight, DTensor) else weight[own]


def chunks(size: int, wires: Wires) -> list[slice]:
    """The chunk of a dimension that each of the ranks computing here holds."""
    return [chunk(size, rank, wires.tp_size) for rank in wires.ranks]


def is_plain(weight: Tensor) -> bool:
    """True for a tensor of numbers: not for a subclass that stands for others, such as torchao's."""
    return type(local(weight.detach())) is Tensor


def is_linear(module: nn.Module) -> bool:
    """True for a layer that computes what ours do: one of another quantizer, say, does not."""
    return isinstance(module, PackedLinear) or (
        isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, DenseLinear.forward)
    )


def is_experts(module: nn.Module) -> bool:
    """True for experts whose weights lie as in Mixtral and Qwen3-MoE, given tokens, their experts, and weights.

    Those in few bits are such.
    """
    if isinstance(module, PackedExperts):
        return True
    shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    if shapes.keys() != EXPERT_WEIGHTS or not hasattr(module, "num_experts"):
        return False
    num_experts, num_features, size = shapes["down_proj"]
    fits = shapes["gate_up_proj"] == (num_experts, 2 * size, num_features)
    lies_so = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    given = inspect.signature(inspect.unwrap(type(module).forward)).parameters  # itself, tokens, experts, weights
    return fits and lies_so and len(given) == 4


def reading_weights(module: nn.Module) -> Iterator[Tensor]:
    """This rank's part of the weights [I, E] whose products with the residual stream are computed, of all ranks if the
    model is whole: of experts one after another.
    """
    if isinstance(module, PackedExperts):
        layers = (layer for expert in module.experts for layer in (expert.gate_proj, expert.up_proj))
        return (layer.dequantized() for layer in layers)
    if isinstance(module, PackedLinear):
        return iter([module.dequantized()])
    weight = local(cast(Tensor, module.weight if isinstance(module, nn.Linear) else module.gate_up_proj))
    return iter(weight.view(-1, *weight.shape[-2:]))


def summed_weight(module: nn.Module) -> Tensor:
    """The weight [E, I], or of experts [X, E, I], whose products are summed over ranks."""
    return cast(Tensor, module.weight if isinstance(module, nn.Linear) else module.down_proj)


def check_dense(subject: str, model: nn.Module) -> None:
    """InvalidInputError for a model whose weights are in few bits."""
    if any(is_packed(module) for module in model.modules()):
        raise InvalidInputError(
            subject,
            expected="one whose weights are values",
            found="one whose weights are in few bits",
            remedy='Load it with weights="dense".',
        )


def is_packed(module: nn.Module) -> bool:
    """True for a layer whose weights are in few bits."""
    return isinstance(module, PackedLinear | PackedEmbedding)
