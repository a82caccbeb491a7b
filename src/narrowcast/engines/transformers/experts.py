"""Mixtures of experts: slices of every expert on each rank, or whole experts, each on one rank.

Slices, and whole experts whose outputs are summed, are one `sum` site: the module of the experts. Where tokens
travel to their experts there are three: `dispatch` (tokens on their way), `combine` (what the experts made of them,
on its way back) and `gather` (each rank's share of the tokens, to all). Every token passes the codec, also one whose
expert is on the same rank, so that its value does not depend on where it is.

Shapes: T tokens, K experts a token, E features, P pairs of a token and one of its experts.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forward, call_with, chunk
from narrowcast.engines.transformers.weights import local
from narrowcast.errors import InvalidInputError
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.wires import Wires

LAYOUT = {"gate_up_proj", "down_proj"}  # [X, 2 * I, E] and [X, E, I] for X experts of I hidden features


def is_supported(module: nn.Module) -> bool:
    """Whether the experts' weights lie as in Mixtral and Qwen3-MoE."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return names == LAYOUT and hasattr(module, "num_experts") and not getattr(module, "is_transposed", False)


def check_divisible(name: str, experts: Any, tp_size: int) -> None:
    """InvalidInputError unless every rank can hold as many whole experts, as the engine wants it."""
    if (number := experts.down_proj.shape[0]) % tp_size:
        raise InvalidInputError(
            name, expected=f"a number of experts that {tp_size} ranks divide", found=number, remedy="Choose another."
        )


def _run(experts: Any, lent: dict[str, Any], x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What the experts compute with the weights that a rank holds.

    PyTorch's grouped product takes rows of whole 16 bytes only: for others the engine's plain loop serves.
    """
    aligned = all(lent[name].shape[-1] * lent[name].itemsize % 16 == 0 for name in LAYOUT)
    y_TE: Tensor = call_with(
        experts, lent, x_TE, experts_TK, weights_TK, forward=None if aligned else _loop_of(experts)
    )
    return y_TE


def _loop_of(experts: nn.Module) -> Forward:
    """The forward under the decorator that picks an implementation."""
    forward: Forward = inspect.unwrap(type(experts).forward)
    return forward


def virtual_slices(name: str, experts: Any, tp_size: int, wires: Wires) -> Forward:
    """Partial outputs of all ranks, each from its slice of every expert."""
    size = experts.down_proj.shape[-1]
    chunks = [chunk(size, rank, tp_size) for rank in range(tp_size)]

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        partials = []
        for own in chunks:
            gate, up = experts.gate_up_proj[:, :size][:, own], experts.gate_up_proj[:, size:][:, own]
            held = {
                "gate_up_proj": torch.cat([gate, up], dim=1),
                "down_proj": experts.down_proj[..., own].contiguous(),
            }
            partials.append(_run(experts, held, x_TE, experts_TK, weights_TK))
        return wires.all_reduce(partials, name)

    return forward


def real_slices(name: str, experts: Any, communicator: Communicator) -> Forward:
    """This rank's partial output, added to those of the others."""
    held = {key: local(weight) for key, weight in experts.named_parameters(recurse=False)}

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        partial = _run(experts, held, x_TE, experts_TK, weights_TK)
        return communicator.all_reduce(partial, name)

    return forward


@dataclass(frozen=True)
class Held:
    """The whole experts that one rank holds: `first`, `first + 1`, ... of the model."""

    experts: Any
    weights: dict[str, Tensor]
    first: int

    @property
    def num_experts(self) -> int:
        return len(self.weights["down_proj"])

    def partial(self, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Outputs of this rank's experts; others count with weight 0, and a number beyond the last that marks them."""
        own_TK = (experts_TK >= self.first) & (experts_TK < self.first + self.num_experts)
        numbers_TK = torch.where(own_TK, experts_TK - self.first, self.num_experts)
        return self._run(x_TE, numbers_TK, weights_TK.masked_fill(~own_TK, 0.0))

    def unweighted(self, x_PE: Tensor, experts_P: Tensor) -> Tensor:
        """The output of one expert a row."""
        if not len(x_PE):
            return x_PE
        numbers_P1 = (experts_P - self.first)[:, None]
        return self._run(x_PE, numbers_P1, torch.ones_like(numbers_P1, dtype=x_PE.dtype))

    def _run(self, x_TE: Tensor, numbers_TK: Tensor, weights_TK: Tensor) -> Tensor:
        lent = {**self.weights, "num_experts": self.num_experts, "_is_expert_parallel": True}
        return _run(self.experts, lent, x_TE, numbers_TK, weights_TK)


def _held_by_all(experts: Any, tp_size: int) -> list[Held]:
    chunks = [chunk(experts.num_experts, rank, tp_size) for rank in range(tp_size)]
    weights = dict(experts.named_parameters(recurse=False))
    return [Held(experts, {key: weight[own] for key, weight in weights.items()}, own.start) for own in chunks]


def _held_here(experts: Any, rank: int) -> Held:
    weights = {key: local(weight) for key, weight in experts.named_parameters(recurse=False)}
    return Held(experts, weights, rank * len(weights["down_proj"]))


def virtual_sum(name: str, experts: Any, tp_size: int, wires: Wires) -> Forward:
    """Every rank runs its experts on all tokens, and the outputs are summed."""

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ranks = _held_by_all(experts, tp_size)
        return wires.all_reduce([held.partial(x_TE, experts_TK, weights_TK) for held in ranks], name)

    return forward


def real_sum(name: str, experts: Any, communicator: Communicator) -> Forward:
    """This rank's experts run on all tokens, and the outputs are summed."""
    held = _held_here(experts, communicator.tp.rank)

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return communicator.all_reduce(held.partial(x_TE, experts_TK, weights_TK), name)

    return forward


@dataclass(frozen=True)
class Routes:
    """Where one rank's share of the tokens goes: its pairs of token and expert, sorted by expert.

    `experts_P` in that order; `order_P` the place of each pair among [T, K]; `counts` the pairs for each rank.
    """

    tokens: slice
    experts_P: Tensor
    order_P: Tensor
    counts: list[int]

    @classmethod
    def of(cls, experts_TK: Tensor, rank: int, tp_size: int, num_held: int) -> "Routes":
        """The routes of `rank`, whose share is a chunk of the batch that all ranks hold."""
        tokens = chunk(len(experts_TK), rank, tp_size)
        flat = experts_TK[tokens].reshape(-1)
        order_P = flat.argsort(stable=True)
        counts = torch.bincount(flat // num_held, minlength=tp_size).tolist()
        return cls(tokens, flat[order_P], order_P, counts)

    def pairs(self, x_TE: Tensor, num_chosen: int) -> Tensor:
        """The token of each pair [P, E]."""
        return x_TE[self.tokens][self.order_P // num_chosen]

    def combined(self, y_PE: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over each token's experts, of this share."""
        y_TKE = torch.empty_like(y_PE)
        y_TKE[self.order_P] = y_PE
        weights_TK = weights_TK[self.tokens]
        total: Tensor = (y_TKE.view(*weights_TK.shape, y_PE.shape[1]) * weights_TK[..., None]).sum(dim=1)
        return total.to(y_PE.dtype)


def sites_of_travelling_tokens(name: str) -> dict[str, str]:
    """Kinds of the three sites of experts to which tokens travel."""
    return {f"{name}.{kind}": kind for kind in ("dispatch", "combine", "gather")}


def virtual_travel(name: str, experts: Any, tp_size: int, wires: Wires) -> Forward:
    """Tokens travel to the ranks of their experts and back, and each rank's share to all."""
    dispatch, combine, gather = sites_of_travelling_tokens(name)

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ranks, num_chosen = _held_by_all(experts, tp_size), experts_TK.shape[1]
        routes = [Routes.of(experts_TK, rank, tp_size, ranks[0].num_experts) for rank in range(tp_size)]
        sent, received = _to_others(routes)
        pairs = wires.all_to_all(torch.cat([each.pairs(x_TE, num_chosen) for each in routes]), dispatch, sent)
        outputs = torch.empty_like(pairs)
        experts_P = torch.cat([each.experts_P for each in routes])
        for held in ranks:  # as it arrives at that rank: by sender, then by expert
            here = (experts_P >= held.first) & (experts_P < held.first + held.num_experts)
            outputs[here] = held.unweighted(pairs[here], experts_P[here])
        back = wires.all_to_all(outputs, combine, received).split([len(each.order_P) for each in routes])
        shares = [each.combined(own, weights_TK) for each, own in zip(routes, back, strict=True)]
        return wires.move(torch.cat(shares), gather, (tp_size - 1) * len(shares[0]))

    return forward


def _to_others(routes: Sequence[Routes]) -> tuple[int, int]:
    """Pairs that rank 0 sends to other ranks' experts, and that it sends back to them."""
    return sum(routes[0].counts[1:]), sum(each.counts[0] for each in routes[1:])


def real_travel(name: str, experts: Any, communicator: Communicator) -> Forward:
    """The same on one rank. All ranks hold all tokens, so each knows how many will come from whom."""
    dispatch, combine, gather = sites_of_travelling_tokens(name)
    rank, tp_size = communicator.tp.rank, communicator.tp.world_size
    held = _held_here(experts, rank)

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        routes = [Routes.of(experts_TK, peer, tp_size, held.num_experts) for peer in range(tp_size)]
        own, incoming = routes[rank], [each.counts[rank] for each in routes]
        pairs = own.pairs(x_TE, experts_TK.shape[1])
        pairs = communicator.all_to_all(pairs, dispatch, own.counts, incoming)
        experts_P = torch.cat([each.experts_P for each in routes])
        here = (experts_P >= held.first) & (experts_P < held.first + held.num_experts)
        outputs = held.unweighted(pairs, experts_P[here])
        back = communicator.all_to_all(outputs, combine, incoming, own.counts)
        share = own.combined(back, weights_TK)
        return communicator.all_gather_tokens(share, gather, [each.tokens.stop - each.tokens.start for each in routes])

    return forward
