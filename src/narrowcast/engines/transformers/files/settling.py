"""Weights where cores read them fastest: side by side in large pages, matrices that read the same tokens as one."""

import os
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowcast.engines.replication import SHARE_OF_MEMORY, free_host_nbytes
from narrowcast.engines.transformers.decoding.layers import FUSED
from narrowcast.weights.arena import Arena
from narrowcast.weights.layers import Fused, PackedLinear


def settle(model: nn.Module, *, in_place: bool = False) -> None:
    """Move the weights of a model on the CPU that are values; those of a file that is read `in_place` stay there.

    They move if there is room for them beside the file that they may be mapped of: where the ranks of this machine,
    which all do so, take at most half of the memory that is free. Matrices in few bits lie so already.
    """
    arena = Arena()
    _join_matrices(model, arena)
    values = [_own(each) for each in model.parameters() if each.device.type == "cpu"]
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not in_place and num_ranks * sum(x.nbytes for x in values) <= SHARE_OF_MEMORY * free_host_nbytes():
        for x in values:
            if x.is_contiguous():
                x.data = arena.room(x.nbytes).view(x.dtype).view(x.shape).copy_(x.detach())


def _own(weight: Tensor) -> Tensor:
    """The very tensor of this rank's part: `to_local` gives an alias."""
    return weight._local_tensor if isinstance(weight, DTensor) else weight


def _join_matrices(model: nn.Module, arena: Arena) -> None:
    for module in model.modules():
        for attribute, names in FUSED.items():
            layers = [module._modules.get(name) for name in names]
            if all(isinstance(layer, PackedLinear) for layer in layers):
                vars(module)[attribute] = Fused.join(cast(list[PackedLinear], layers), arena)
