"""Where values travel in one process."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Wires(Protocol):
    """Where the values of all ranks travel in one process: what the ranks put in at a site, what they get."""

    def all_reduce(self, partials: Sequence[Tensor], site: str) -> Tensor:
        """The sum [..., E] of what each rank puts in."""
        ...

    def all_reduce_linear(self, inputs: Sequence[Tensor], weights: Sequence[Tensor], site: str) -> Tensor:
        """The sum of the products of each rank's input [..., F] with its weights [E, F]."""
        return self.all_reduce([functional.linear(x, w) for x, w in zip(inputs, weights, strict=True)], site)

    def all_gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        """The parts [..., E0], [..., E1], ... of the ranks, side by side."""
        ...

    def move(self, x: Tensor, site: str, num_sent: int) -> Tensor:
        """`x` [..., E] as another rank receives it; rank 0 (of a stage) sends `num_sent` tokens in all."""
        ...

    def all_to_all(self, x_PE: Tensor, site: str, num_sent: int) -> Tensor:
        """The same for tokens on their way to experts or back, which are in no order."""
        ...
