"""Row-parallel products: what a rank puts into the sum at a site, computed from tokens.

Shapes: T tokens, F features of the input, E features of the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from narrowcast.weights.packed import PackedMatrix
from narrowcast.weights.products import multiply, multiply_dense


class Product(Protocol):
    """`product(tokens) -> partial`: of tokens [T, F], what one rank puts into their sum, [T, num_features].

    What its weights look like is its own affair: dense, in few bits, low-rank, rows that are looked up. A token's
    product depends on that token alone, so that tokens may be computed while others travel; and on `num_tokens`, of
    which these are some: few may be computed in another way than many.
    """

    @property
    def num_features(self) -> int:
        """E of the sum."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the sum; None for that of the tokens."""
        ...

    def __call__(self, x_TF: Tensor, num_tokens: int, /) -> Tensor:
        """Partial sums of these tokens, of `num_tokens` that are summed up together."""
        ...


@dataclass(frozen=True)
class Dense:
    """The product with a matrix: `weight()` is [E, F] of this rank; `columns`, its features of a whole input."""

    weight: Callable[[], Tensor]
    num_features: int
    columns: slice | None = None
    dtype = None

    def __call__(self, x_TF: Tensor, num_tokens: int) -> Tensor:
        return multiply_dense(self.weight(), self._own(x_TF), num_tokens=num_tokens)

    def _own(self, x_TF: Tensor) -> Tensor:
        return x_TF if self.columns is None else x_TF[:, self.columns].contiguous()


@dataclass(frozen=True)
class Packed:
    """The product with a matrix in few bits, [E, F] of this rank, or `held`, its features among all of the matrix.

    `columns`: its features of a whole input.
    """

    matrix: PackedMatrix
    num_features: int
    columns: slice | None
    held: slice
    dtype = None

    def __call__(self, x_TF: Tensor, num_tokens: int) -> Tensor:
        own_TF = x_TF if self.columns is None else x_TF[:, self.columns]
        return multiply(self.matrix, own_TF, columns=self.held, num_tokens=num_tokens)
