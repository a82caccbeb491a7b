"""Wires: the one seam between an engine's forwards and whatever its values travel over.

An engine gives each forward that would communicate the wires, and hands them what the ranks that compute here put in:
one rank of a split model, or all ranks of a whole model that is split virtually.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from narrowcast.runtime.feedback import Feedback
from narrowcast.runtime.operators import Operator, register
from narrowcast.runtime.products import Product

T = TypeVar("T")


class Wires(ABC):
    """Where the values of `tp_size` ranks travel. `rank`: the one that computes here; None for all, virtually.

    `deterministic`: products are computed alike whatever the number of tokens.
    A value that is put in is a sequence with one tensor for each of `ranks`. `feedback`: what sums leave to later ones.
    """

    def __init__(self, rank: int | None, tp_size: int, feedback: Feedback | None = None) -> None:
        self.virtual, self.tp_size = rank is None, tp_size
        self.feedback = feedback or Feedback()
        self.ranks: Sequence[int] = range(tp_size) if rank is None else (rank,)
        self.deterministic = False
        self.handle = register(self)
        self._products: dict[str, Sequence[Product]] = {}
        self._columns: dict[str, Sequence[int]] = {}

    def row_parallel(self, site: str, products: Sequence[Product]) -> Operator:
        """The operator that sums, over all ranks, the products of tokens [..., F]; one product for each of `ranks`."""
        self._products[site] = products
        return Operator("row_parallel", site, self)

    def column_parallel(self, site: str, num_features: Sequence[int]) -> Operator:
        """The operator that puts all ranks' columns side by side; rank r computes `num_features[r]` of them.

        It takes the columns of `ranks`, [..., E], side by side.
        """
        self._columns[site] = num_features
        return Operator("all_gather", site, self, adds_up=False)

    def partial_sums(self, site: str) -> Operator:
        """The operator that adds up partial sums which exist already: [..., E], or of virtual ranks [R, ..., E]."""
        return Operator("all_reduce", site, self)

    def products(self, site: str) -> Sequence[Product]:
        """The products of a site, as `row_parallel` was given them."""
        return self._products[site]

    def columns(self, site: str) -> Sequence[int]:
        """The columns by rank of a site, as `column_parallel` was given them."""
        return self._columns[site]

    def run_parts(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """The results of parts of a forward, consecutive tokens of all sequences each: one after another, or in turns.

        Both are the same arithmetic, as each part finds what those before it have written.
        """
        return [part() for part in parts]

    def counted(self, num_tokens: int) -> int:
        """The number of tokens by which products choose how they are computed."""
        return 1 if self.deterministic else num_tokens

    def residue(self, site: str, num_tokens: int, num_features: int, device: torch.device) -> Tensor | None:
        """The loss that earlier sums of this forward have left to this one; None for none."""
        return self.feedback.residue(site, num_tokens, num_features, device)

    def read(self, norm: str, stream: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a norm's `forward` to the residual stream [..., E]; `inputs` then gives what each rank makes of it."""
        return self.feedback.read(norm, stream, forward, self.ranks)

    def keep(self, norm: str, stream: Tensor, forward: Callable[[Tensor], Tensor]) -> None:
        """Do the same with a stream of which the norm was computed elsewhere, with the sum that came last."""
        self.feedback.keep(norm, stream, forward, self.ranks)

    def inputs(self, module: str, x: Tensor) -> Sequence[Tensor]:
        """The inputs from which `module`, called with `x`, is to compute the share of each of `ranks`."""
        return self.feedback.inputs(module, x, self.ranks)

    def sum_products(self, x: Tensor, site: str, residue: Tensor | None = None) -> Tensor:
        """The sum [..., E] over all ranks of their products of tokens `x` [..., F]."""
        x_TF = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # a rank may hold no column
        total_TE = self.sum([product(x_TF, self.counted(len(x_TF))) for product in self.products(site)], site, residue)
        return total_TE.view(*x.shape[:-1], total_TE.shape[-1])

    @abstractmethod
    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        """The sum [..., E] over all ranks of the partial sums that they put in.

        It takes the `residue` along, and leaves in its place what is lost now.
        """

    @abstractmethod
    def gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        """The columns [..., E0], [..., E1], ... of all ranks, side by side."""

    @abstractmethod
    def gather_tokens(self, parts: Sequence[Tensor], site: str, num_tokens: Sequence[int]) -> Tensor:
        """The tokens of all ranks in rank order; rank r holds `num_tokens[r]` of them."""

    @abstractmethod
    def all_to_all(self, parts: Sequence[Tensor], site: str, counts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The tokens that come to each of `ranks`, in rank order; `counts[src][dst]` go from rank src to rank dst.

        What a rank puts in holds its tokens for rank 0 first.
        """


class VirtualWires(Wires):
    """Wires of all ranks of a whole model, which compute one after another in this process."""

    def __init__(self, tp_size: int, feedback: Feedback | None = None) -> None:
        super().__init__(None, tp_size, feedback)

    @abstractmethod
    def move(self, x: Tensor, site: str, copies: int) -> Tensor:
        """`x` [..., E] as `copies` other pipeline stages receive it."""
