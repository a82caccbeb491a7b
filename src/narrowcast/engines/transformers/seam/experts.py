"""Mixtures of experts: slices of every expert on each rank, or expert parallelism: whole experts, each on one rank.

Slices, and whole experts whose outputs are summed, are one `sum` site: the module of the experts. Where tokens
travel to their experts there are three: `dispatch` (tokens on their way), `combine` (what the experts made of them,
on its way back) and `gather` (each rank's share of the tokens, to all). Every token passes the codec, also one whose
expert is on the same rank, so that its value does not depend on where it is.

Shapes: T tokens, K experts a token, E features, P pairs of a token and one of its experts.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forward, call_with, chunk
from narrowcast.engines.transformers.sharding import EXPERT_WEIGHTS, chunks
from narrowcast.errors import InvalidInputError
from narrowcast.runtime.wires import Wires
from narrowcast.weights.experts import PackedExperts
from narrowcast.weights.layers import local

Weights = dict[str, Tensor]


def check_whole(name: str, experts: Any, tp_size: int) -> None:
    """InvalidInputError unless every rank can hold as many whole experts, as the engine wants it, in values."""
    if isinstance(experts, PackedExperts):
        raise InvalidInputError(
            name,
            expected="slices of each expert on every rank, or whole experts in values",
            found="whole experts in few bits",
            remedy='Leave out experts, or load the model with weights="dense".',
        )
    if (number := experts.down_proj.shape[0]) % tp_size:
        raise InvalidInputError(
            name, expected=f"a number of experts that {tp_size} ranks divide", found=number, remedy="Choose another."
        )


def slices(name: str, experts: Any, wires: Wires) -> Forward:
    """The sum of the ranks' outputs, each from its slice of every expert."""
    outputs = (
        _outputs_of_packed(name, experts, wires) if isinstance(experts, PackedExperts) else _outputs(experts, wires)
    )
    all_reduce = wires.partial_sums(name)

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        pairs = zip(outputs, wires.inputs(name, x_TE), strict=True)
        return all_reduce(_put_in([output(x, experts_TK, weights_TK) for output, x in pairs], wires))

    return forward


def _outputs_of_packed(name: str, experts: PackedExperts, wires: Wires) -> list[Forward]:
    """The outputs of the slices of each rank that computes here."""
    if not wires.virtual:
        return [functools.partial(PackedExperts.forward, experts)]
    by_rank = chunks(experts.num_hidden, wires)
    for own, expert in itertools.product(by_rank, experts.experts):
        expert.down_proj.matrix.check_columns(f"{name}.*.down_proj", own, wires.tp_size)
    return [functools.partial(experts.part, own=own) for own in by_rank]


def _outputs(experts: Any, wires: Wires) -> list[Forward]:
    """The same of weights in values."""
    return [functools.partial(_run_slice, experts, own) for own in _slices_of(experts, wires)]


def _run_slice(experts: Any, own: Callable[[], Weights], *args: Tensor) -> Tensor:
    return _run(experts, own(), *args)


def _slices_of(experts: Any, wires: Wires) -> list[Callable[[], Weights]]:
    """The weights of each rank that computes here."""
    if not wires.virtual:
        held = {key: local(weight) for key, weight in experts.named_parameters(recurse=False)}
        return [lambda: held]
    size = experts.down_proj.shape[-1]

    def weights(own: slice) -> Weights:
        gate, up = experts.gate_up_proj[:, :size][:, own], experts.gate_up_proj[:, size:][:, own]
        down = experts.down_proj[..., own].contiguous()
        return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}

    return [lambda own=own: weights(own) for own in chunks(size, wires)]  # type: ignore[misc]


def _put_in(partials: list[Tensor], wires: Wires) -> Tensor:
    return torch.stack(partials) if wires.virtual else partials[0]


def _run(experts: Any, lent: dict[str, Any], x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts' outputs with the weights that a rank holds.

    PyTorch's grouped product takes rows of whole 16 bytes only: for others the engine's plain loop serves.
    """
    aligned = all(lent[name].shape[-1] * lent[name].itemsize % 16 == 0 for name in EXPERT_WEIGHTS)
    y_TE: Tensor = call_with(
        experts, lent, x_TE, experts_TK, weights_TK, forward=None if aligned else _loop_of(experts)
    )
    return y_TE


def _loop_of(experts: nn.Module) -> Forward:
    """The forward under the decorator that picks an implementation."""
    forward: Forward = inspect.unwrap(type(experts).forward)
    return forward


@dataclass(frozen=True)
class Held:
    """The whole experts that one rank holds: `first`, `first + 1`, ... of the model."""

    experts: Any
    weights: Weights
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

    def of(self, experts_P: Tensor) -> Tensor:
        """Those of `experts_P` that are held here."""
        return experts_P[(experts_P >= self.first) & (experts_P < self.first + self.num_experts)]

    def _run(self, x_TE: Tensor, numbers_TK: Tensor, weights_TK: Tensor) -> Tensor:
        lent = {**self.weights, "num_experts": self.num_experts, "_is_expert_parallel": True}
        return _run(self.experts, lent, x_TE, numbers_TK, weights_TK)


def _held(experts: Any, wires: Wires) -> Callable[[], list[Held]]:
    """The whole experts of each rank that computes here."""
    weights = {key: local(weight) for key, weight in experts.named_parameters(recurse=False)}
    if not wires.virtual:
        here = [Held(experts, weights, wires.ranks[0] * len(weights["down_proj"]))]
        return lambda: here

    def of_all() -> list[Held]:
        weights = dict(experts.named_parameters(recurse=False))
        by_rank = chunks(experts.num_experts, wires)
        return [Held(experts, {key: weight[own] for key, weight in weights.items()}, own.start) for own in by_rank]

    return of_all


def whole_experts(name: str, experts: Any, wires: Wires) -> Forward:
    """The sum of the ranks' outputs, each of its own experts for all tokens."""
    held, all_reduce = _held(experts, wires), wires.partial_sums(name)

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        pairs = zip(held(), wires.inputs(name, x_TE), strict=True)
        return all_reduce(_put_in([each.partial(x, experts_TK, weights_TK) for each, x in pairs], wires))

    return forward


@dataclass(frozen=True)
class Routes:
    """The way of one rank's share of the tokens: its pairs of token and expert, sorted by expert.

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


def travelling_tokens(name: str, experts: Any, wires: Wires) -> Forward:
    """Tokens travel to the ranks of their experts and back, and each rank's share to all.

    All ranks hold all tokens, so each knows how many will come from whom.
    """
    dispatch, combine, gather = sites_of_travelling_tokens(name)
    held, tp_size = _held(experts, wires), wires.tp_size

    def forward(x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        here, num_chosen = held(), experts_TK.shape[1]
        routes = [Routes.of(experts_TK, rank, tp_size, here[0].num_experts) for rank in range(tp_size)]
        own, counts = [routes[rank] for rank in wires.ranks], [each.counts for each in routes]
        arrived = wires.all_to_all([each.pairs(x_TE, num_chosen) for each in own], dispatch, counts)
        experts_P = torch.cat([each.experts_P for each in routes])  # by sender, then by expert, as they arrive
        pairs = zip(here, arrived, strict=True)
        outputs = [each.unweighted(x_PE, each.of(experts_P)) for each, x_PE in pairs]
        back = wires.all_to_all(outputs, combine, [list(column) for column in zip(*counts, strict=True)])
        shares = [each.combined(y_PE, weights_TK) for each, y_PE in zip(own, back, strict=True)]
        return wires.gather_tokens(shares, gather, [each.tokens.stop - each.tokens.start for each in routes])

    return forward
