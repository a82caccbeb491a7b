"""Row-parallel products: what a rank puts into the sum at a site, computed from tokens.

Shapes: T tokens, F features of the input, E features of the sum, K components.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.plan.transform import Transform


class Product(Protocol):
    """`product(tokens) -> partial`: of tokens [T, F], what one rank puts into their sum, [T, num_features].

    What its weights look like is its own affair: dense, in few bits, low-rank, rows that are looked up. A token's
    product depends on that token alone, so that tokens may be computed while others travel.
    """

    @property
    def num_features(self) -> int:
        """E of the sum."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the sum; None for that of the tokens."""
        ...

    def __call__(self, x_TF: Tensor, /) -> Tensor:
        """Partial sums of these tokens."""
        ...


@dataclass(frozen=True)
class Dense:
    """The product with a matrix: `weight()` is [E, F] of this rank; `columns`, its features of a whole input."""

    weight: Callable[[], Tensor]
    num_features: int
    columns: slice | None = None
    dtype = None

    def __call__(self, x_TF: Tensor) -> Tensor:
        return functional.linear(self._own(x_TF), self.weight())

    def folded(self, transform: Transform, rank: int) -> "Components":
        """The product that gives the rank's components at once: their analysis is folded into the weights."""
        folded_KF = transform.fold(self.weight(), rank)
        return Components(
            lambda x_TF: transform.placed(functional.linear(self._own(x_TF), folded_KF), rank), transform.num_components
        )

    def _own(self, x_TF: Tensor) -> Tensor:
        return x_TF if self.columns is None else x_TF[:, self.columns].contiguous()


@dataclass(frozen=True)
class Components:
    """A rank's own components [T, K] of what it puts into a sum, among zeros."""

    of_tokens: Callable[[Tensor], Tensor]
    num_features: int
    dtype = None

    def __call__(self, x_TF: Tensor) -> Tensor:
        return self.of_tokens(x_TF)


def components(product: Product, transform: Transform, rank: int) -> Product:
    """The product that gives components along the transform's axes in place of features."""
    if isinstance(product, Dense):
        return product.folded(transform, rank)
    return Components(
        lambda x_TF: transform.analyze(partial := product(x_TF), rank).to(partial.dtype), transform.num_components
    )
