"""Replacing a module's forward, exactly undone; and a whole model that computes as if it were split."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.errors import InvalidInputError

Forward = Callable[[Tensor], Tensor]
Reduce = Callable[[Sequence[Tensor], str], Tensor]


class Forwards:
    """Forwards that were replaced on module instances."""

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, Forward | None]] = []

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Let `module` call `forward`, without gradients. Training on it raises InvalidInputError."""

        def inference(x: Tensor) -> Tensor:
            if module.training and x.requires_grad:
                raise InvalidInputError(
                    "model",
                    expected="inference",
                    found="training: a forward in train mode with gradients",
                    remedy="Call model.eval(), or remove() the plan before training.",
                )
            with torch.no_grad():
                return forward(x)

        self._originals.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = inference

    def restore(self) -> None:
        """Give every module the forward that it had."""
        while self._originals:
            module, original = self._originals.pop()
            if original is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = original


def chunk(size: int, rank: int, tp_size: int) -> slice:
    """What `rank` holds of a dimension by DTensor's rule (torch.chunk): the last ranks may hold less, or none."""
    width = -(-size // tp_size)
    return slice(min(rank * width, size), min((rank + 1) * width, size))


def split_virtually(layers: Mapping[str, nn.Linear], tp_size: int, reduce: Reduce) -> Forwards:
    """Let each row-parallel layer compute the partial sums of `tp_size` ranks; `reduce(partials, name)` adds them."""
    forwards = Forwards()
    for name, layer in layers.items():
        forwards.replace(layer, _virtual_forward(name, layer, tp_size, reduce))
    return forwards


def _virtual_forward(name: str, layer: nn.Linear, tp_size: int, reduce: Reduce) -> Forward:
    chunks = [chunk(layer.in_features, rank, tp_size) for rank in range(tp_size)]

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        partials = [functional.linear(x[..., own].contiguous(), weight[:, own].contiguous()) for own in chunks]
        return add_bias(reduce(partials, name), layer.bias)

    return forward


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """The bias is added once, after the sum."""
    return y if bias is None else y + bias
