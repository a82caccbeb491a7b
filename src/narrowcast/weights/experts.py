"""Mixtures of experts whose matrices are in few bits: a layer for each matrix of each expert.

Shapes: T tokens, K experts a token, X experts, E features, I hidden features of an expert, P pairs of a token and one
of its experts.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from narrowcast.weights.layers import Fused, PackedLinear
from narrowcast.weights.products import multiply

# The matrices of an expert, by the weights in which some models have those of all experts: [X, 2 * I, E], [X, E, I].
JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def layer_names(experts: str, weight: str, num_experts: int) -> list[str]:
    """The layers, one expert after another, of which a weight of module `experts` is made."""
    return [f"{experts}.{number}.{layer}" for number in range(num_experts) for layer in JOINED[weight]]


class PackedExpert(nn.Module):
    """One expert. `fused_gate_up`: the first two layers asked at once, where their matrices are rows of one."""

    fused_gate_up: Fused | None = None

    def __init__(self, num_features: int, num_hidden: int) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(num_features, num_hidden)
        self.up_proj = PackedLinear(num_features, num_hidden)
        self.down_proj = PackedLinear(num_hidden, num_features)

    def output(self, x_PE: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """The output [P, E] of all hidden features held."""
        fused = self.fused_gate_up
        gate_PI, up_PI = (self.gate_proj(x_PE), self.up_proj(x_PE)) if fused is None else fused(x_PE)
        return cast(Tensor, self.down_proj(activate(gate_PI) * up_PI))

    def part(self, x_PE: Tensor, activate: Callable[[Tensor], Tensor], own: slice) -> Tensor:
        """The same of hidden features `own` alone, without gradients."""
        num_tokens = 1 if self.down_proj.batch_invariant else None
        gate_PI, up_PI = (
            each.multiply(x_PE, rows=own, num_tokens=num_tokens) for each in (self.gate_proj, self.up_proj)
        )
        return multiply(self.down_proj.matrix, activate(gate_PI) * up_PI, columns=own, num_tokens=num_tokens)


class PackedExperts(nn.Module):
    """X experts, or this rank's hidden features of each. `samples`: as of `PackedLinear`, columns of `down_proj`."""

    def __init__(
        self, num_experts: int, num_features: int, num_hidden: int, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.num_experts, self.num_hidden, self.act_fn = num_experts, num_hidden, act_fn
        for number in range(num_experts):
            self.add_module(str(number), PackedExpert(num_features, num_hidden))
        self.samples: Mapping[int, str] = {}

    @property
    def experts(self) -> Iterator[PackedExpert]:
        """One after another."""
        return (cast(PackedExpert, self._modules[str(number)]) for number in range(self.num_experts))

    def forward(self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The sums [T, E] of the outputs of each token's experts, times their weights.

        In FP32, in the order of the experts, rounded once: a token's bits do not depend on the others.
        """
        return self._sum(PackedExpert.output, x_TE, experts_TK, weights_TK)

    def part(self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor, own: slice) -> Tensor:
        """The same of hidden features `own` alone, without gradients."""
        return self._sum(functools.partial(PackedExpert.part, own=own), x_TE, experts_TK, weights_TK)

    def _sum(self, output: Callable[..., Tensor], x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        numbers, order_P = experts_TK.flatten().sort(stable=True)
        counts = Counter(numbers.tolist())
        tokens = order_P.div(experts_TK.shape[1], rounding_mode="floor").split(list(counts.values()))
        weights = weights_TK.reshape(-1, 1)[order_P].float().split(list(counts.values()))
        total_TE = torch.zeros(x_TE.shape, dtype=torch.float32)
        for number, tokens_P, weights_P1 in zip(counts, tokens, weights, strict=True):
            y_PE = output(self._modules[str(number)], x_TE[tokens_P], self.act_fn)
            total_TE.index_add_(0, tokens_P, y_PE * weights_P1)
        return total_TE.to(x_TE.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts of {self.num_hidden} hidden features"
