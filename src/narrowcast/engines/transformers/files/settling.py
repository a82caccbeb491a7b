"""Weights where cores read them fastest: side by side in large pages, matrices that read the same tokens as one."""

import os
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowcast.engines.replication import SHARE_OF_MEMORY, free_host_nbytes
from narrowcast.engines.transformers.decoding.layers import FUSED
from narrowcast.weights.arena import Arena
from narrowcast.weights.layers import Fused, PackedEmbedding, PackedLinear
from narrowcast.weights.packed import PackedMatrix


def settle(model: nn.Module, *, in_place: bool = False) -> None:
    """Move the weights of a model on the CPU; those of a file that kernels read `in_place` stay there.

    What is in values moves if there is room for it beside the file that it may be mapped of: where the ranks of this
    machine, which all do so, take at most half of the memory that is free.
    """
    arena = Arena()
    _settle_matrices(model, arena, in_place=in_place)
    values = [_own(each) for each in model.parameters() if each.device.type == "cpu"]
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not in_place and num_ranks * sum(x.nbytes for x in values) <= SHARE_OF_MEMORY * free_host_nbytes():
        for x in values:
            if x.is_contiguous():
                x.data = arena.room(x.nbytes).view(x.dtype).view(x.shape).copy_(x.detach())


def _own(weight: Tensor) -> Tensor:
    """The very tensor of this rank's part: `to_local` gives an alias."""
    return weight._local_tensor if isinstance(weight, DTensor) else weight


def _settle_matrices(model: nn.Module, arena: Arena, *, in_place: bool) -> None:
    settled = set[int]()
    for module in model.modules():
        for attribute, names in FUSED.items():
            layers = [module._modules.get(name) for name in names]
            if all(isinstance(layer, PackedLinear) for layer in layers):
                found = vars(module)[attribute] = Fused.join(cast(list[PackedLinear], layers), arena)
                settled |= {id(layer) for layer in layers if found is not None}
    moved: dict[int, PackedMatrix] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedEmbedding) and id(module) not in settled:
            before = module.matrix
            if id(before) not in moved:
                settled_one = None if in_place else PackedMatrix.joined([before], arena)
                moved[id(before)] = before if settled_one is None else settled_one[0]
            module.matrix = moved[id(before)]
