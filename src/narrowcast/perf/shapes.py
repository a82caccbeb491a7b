"""Llama shapes by their number of parameters."""

from dataclasses import dataclass

VOCAB_SIZE, HEAD_SIZE = 32_000, 128


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama's layers."""

    hidden_size: int
    num_layers: int
    intermediate_size: int

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_SIZE

    @property
    def num_parameters(self) -> int:
        """Of the layers: the embedding and the output layer come on top."""
        each = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * each

    def __str__(self) -> str:
        millions = self.num_parameters / 1e6
        return (
            f"{self.num_layers} layers of {self.hidden_size} and {self.intermediate_size}, {millions:.4g}M parameters"
        )


def shape_of(num_parameters: int) -> Shape:
    """The shape whose layers have about `num_parameters`; a layer for each 256 of its width, as small Llamas have.

    >>> str(shape_of(380_000_000))
    '8 layers of 2048 and 4992, 379.6M parameters'
    """
    usual = [Shape(256 * each, each, 128 * round(256 * each * 8 / 3 / 128)) for each in range(1, 65)]
    nearest = min(usual, key=lambda shape: abs(shape.num_parameters - num_parameters))
    left = num_parameters / nearest.num_layers - 4 * nearest.hidden_size**2
    intermediate_size = 64 * max(round(left / (3 * nearest.hidden_size) / 64), 1)
    return Shape(nearest.hidden_size, nearest.num_layers, intermediate_size)
