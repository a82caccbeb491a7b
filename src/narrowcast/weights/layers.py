"""Layers whose weights are in few bits: linear ones, and embeddings.

Shapes: T tokens, N rows (features of the output), K columns (features of the input), V rows of an embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.weights.arena import Arena
from narrowcast.weights.packed import ALL, BLOCK_ROWS, PackedMatrix
from narrowcast.weights.products import dequantized_bf16, look_up, multiply, multiply_dense


class PackedLinear(nn.Module):
    """A linear layer of `in_features` and `out_features`, or this rank's rows or columns of it.

    `matrix`: what this process holds. `samples`: digests of columns of the checkpoint's own values by place, by which a
    model is told from others. `device_mesh`: that of the ranks that share the layer out. `batch_invariant`: products
    are computed alike whatever the number of tokens.
    """

    matrix: PackedMatrix
    bias: nn.Parameter | None
    batch_invariant = False
    _hf_quantized_needs_local_tp = True  # Transformers' word for a layer that takes plain tensors when it is split

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.samples: Mapping[int, str] = {}
        self.device_mesh: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Products of tokens [..., K] with all rows held, plus the bias."""
        bias = None if self.bias is None else local(self.bias)
        return self.multiply(x, bias, num_tokens=1 if self.batch_invariant else None)

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, rows: slice = ALL, num_tokens: int | None = None
    ) -> Tensor:
        """Products [..., N] of tokens [..., K] with rows of what is held; gradients reach the tokens.

        `num_tokens`: by which the way to multiply is chosen, theirs by default.
        """
        return _multiply(self.matrix, x, bias, rows, num_tokens)

    def dequantized(self) -> Tensor:
        """The values held, BF16 [N, K]."""
        return dequantized_bf16(self.matrix)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.matrix.format.name}"


class DenseLinear(nn.Linear):
    """A linear layer of PyTorch that reads weights in BF16 at the memory's rate where tokens are few.

    `batch_invariant`: as of `PackedLinear`.
    """

    batch_invariant = False

    def forward(self, x: Tensor) -> Tensor:
        """Products of tokens [..., K], plus the bias."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
            return super().forward(x)
        num_tokens = 1 if self.batch_invariant else None
        y_TN = multiply_dense(self.weight, x.reshape(-1, x.shape[-1]), self.bias, num_tokens=num_tokens)
        return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


class Fused:
    """Layers that read the same tokens, asked at once: their matrices are rows of one."""

    def __init__(self, matrix: PackedMatrix, layers: Sequence[PackedLinear]) -> None:
        self._matrix, self._sizes, self._first = matrix, [layer.matrix.shape[0] for layer in layers], layers[0]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat([local(bias.data) for bias in biases]) if biases else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The products [..., N] of tokens [..., K] with each layer; gradients reach the tokens."""
        num_tokens = 1 if self._first.batch_invariant else None
        parts: tuple[Tensor, ...] = _multiply(self._matrix, x, self._bias, ALL, num_tokens).split(self._sizes, dim=-1)
        return parts

    @staticmethod
    def join(layers: Sequence[PackedLinear], arena: Arena) -> "Fused | None":
        """Put the matrices of layers behind each other in an arena; None where they are too different, or in a file."""
        first, *others = layers
        alike = all(
            each.matrix.is_like(first.matrix) and (each.bias is None) == (first.bias is None) for each in others
        )
        if not alike or any(each.matrix.shape[0] % BLOCK_ROWS for each in layers):
            return None
        if (joined := PackedMatrix.joined([layer.matrix for layer in layers], arena)) is None:
            return None
        whole, *parts = joined
        for layer, part in zip(layers, parts, strict=True):
            layer.matrix = part
        return Fused(whole, layers)


def _multiply(matrix: PackedMatrix, x: Tensor, bias: Tensor | None, rows: slice, num_tokens: int | None) -> Tensor:
    """Products [..., N] of tokens [..., K]; gradients reach the tokens."""
    x_TK = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and x.requires_grad:
        y_TN: Tensor = _Product.apply(x_TK, matrix, bias, rows)  # type: ignore[no-untyped-call]
    else:
        y_TN = multiply(matrix, x_TK, bias, rows=rows, num_tokens=num_tokens)
    return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, matrix: PackedMatrix, bias: Tensor | None, rows: slice) -> Tensor:
        ctx.part = matrix, rows
        return multiply(matrix, x_TK.detach(), bias, rows=rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        matrix, rows = ctx.part
        (y_TN,) = gradients
        return y_TN @ dequantized_bf16(matrix, rows).to(y_TN.dtype), None, None, None


class PackedEmbedding(nn.Module):
    """An embedding of V tokens, or this rank's rows of it; Gemma scales what is found. Attributes as of `PackedLinear`.

    `dtype`: of what is found; `model.float()` and its like change it. `samples`: of rows.
    """

    matrix: PackedMatrix
    scale: Tensor | None
    _like: Tensor
    _hf_quantized_needs_local_tp = True

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        self.samples: Mapping[int, str] = {}
        self.device_mesh: Any = None
        self.own = slice(0, num_embeddings)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., K] of tokens; zeros of those that another rank holds."""
        least, largest = (int(each) for each in ids.aminmax()) if ids.numel() else (0, 0)
        if not 0 <= least <= largest < self.num_embeddings:
            raise IndexError(f"token ids from {least} to {largest} for a vocabulary of {self.num_embeddings}")
        if self.own == slice(0, self.num_embeddings):
            return self.look_up(ids)
        held = (ids >= self.own.start) & (ids < self.own.stop)
        found = self.look_up((ids - self.own.start).masked_fill(~held, 0))
        return found.masked_fill(~held[..., None], 0)

    @property
    def dtype(self) -> torch.dtype:
        """That of what is found."""
        return self._like.dtype

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows [..., K] of what is held."""
        if not self.matrix.shape[0]:
            return torch.zeros(*rows.shape, self.embedding_dim, dtype=self.dtype)
        found = look_up(self.matrix, rows.flatten()).to(self.dtype).view(*rows.shape, self.embedding_dim)
        return found if self.scale is None else found * self.scale.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.format.name}"


def local(weight: Tensor) -> Tensor:
    """The part of a weight that this rank holds."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight  # of a DTensor
    return part
