"""Formats of weights in few bits: what a matrix's numbers are, before and after they are packed.

Shapes: N rows (features of the output), K columns (features of the input), G groups of columns that share a scale.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError

Offset = Literal["middle", "minimum", "zero_point"]
Activations = Literal["int8", "bf16"]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A matrix [N, K] of unsigned codes, a scale for each row of each group of columns.

    `offset`: what a code stands for. "middle": scale * (code - 2 ** (num_bits - 1)), as in GGUF's Q4_0 and Q8_0;
    "minimum": scale * code + minimum, as in Q4_1; "zero_point": scale * (code - zero), as in AWQ and GPTQ.
    Of 2 bits, three codes stand for -1, 0 and 1, and one scale is that of the whole matrix (BitNet b1.58).
    `activations`: what the product reads. "int8": activations rounded to 8 bits by groups of 32 columns, as llama.cpp
    does, or of ternary weights by token; "bf16": as they are.
    """

    num_bits: int
    group_size: int
    offset: Offset
    activations: Activations

    @property
    def name(self) -> str:
        """As users write it: int4-group32, int4-group128-zero-point."""
        suffix = "" if self.offset == "middle" else f"-{self.offset.replace('_', '-')}"
        return "ternary" if self.is_ternary else f"int{self.num_bits}-group{self.group_size}{suffix}"

    @property
    def is_ternary(self) -> bool:
        """True for three codes and one scale."""
        return self.num_bits == 2

    @property
    def middle(self) -> int:
        """The code that stands for zero where nothing says which one does."""
        return 1 if self.is_ternary else 1 << self.num_bits - 1

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """Those that scales may have."""
        if self.is_ternary:
            return (torch.float32,)
        return (torch.float16,) if self.activations == "int8" else (torch.float16, torch.bfloat16)

    def scales_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """[N, G] of a matrix [N, K]; [1, 1] for one scale."""
        return (1, 1) if self.is_ternary else (num_rows, num_columns // self.group_size)


Q4_0 = WeightFormat(num_bits=4, group_size=32, offset="middle", activations="int8")
Q4_1 = WeightFormat(num_bits=4, group_size=32, offset="minimum", activations="int8")
Q8_0 = WeightFormat(num_bits=8, group_size=32, offset="middle", activations="int8")
TERNARY = WeightFormat(num_bits=2, group_size=32, offset="middle", activations="int8")


def w4a16(group_size: int) -> WeightFormat:
    """4 bits with zero points, activations in BF16: the format of AWQ, GPTQ and compressed-tensors' W4A16."""
    return WeightFormat(num_bits=4, group_size=group_size, offset="zero_point", activations="bf16")


def format_named(name: str) -> WeightFormat | None:
    """The format that has this name; None if none has."""
    fixed = {each.name: each for each in (Q4_0, Q4_1, Q8_0, TERNARY)}
    found = re.fullmatch(r"int4-group([1-9][0-9]{1,8})-zero-point", name, re.ASCII)
    if found is None:
        return fixed.get(name)
    return None if (size := int(found[1])) % 32 else w4a16(size)


@dataclass(frozen=True)
class GroupedCodes:
    """A matrix [N, K] in a format, or some of its rows and whole groups of its columns, as files have it.

    `codes`: uint8 [N, K], below 2 ** num_bits. `scales`: FP16 [N, G], or BF16 beside activations in BF16; FP32 [1, 1]
    of ternary ones. `offsets`: minima, of the dtype of `scales`, or zero points, uint8, [N, G]; None with "middle".
    Raises InvalidInputError for shapes and dtypes that do not go together.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        num_rows, num_columns = self.codes.shape
        groups, dtypes = self.format.scales_shape(num_rows, num_columns), self.format.scale_dtypes
        if num_columns % self.format.group_size:
            raise _wrong("columns", f"a multiple of {self.format.group_size}", num_columns)
        if self.codes.dtype != torch.uint8:
            raise _wrong("codes", "uint8", self.codes.dtype)
        if self.scales.shape != groups or self.scales.dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            raise _wrong("scales", f"{expected} {groups}", f"{self.scales.dtype} {tuple(self.scales.shape)}")
        kinds = {"middle": None, "minimum": self.scales.dtype, "zero_point": torch.uint8}
        found = None if self.offsets is None else self.offsets.dtype
        if found != kinds[self.format.offset] or (self.offsets is not None and self.offsets.shape != groups):
            raise _wrong("offsets", f"{kinds[self.format.offset]} {groups}", found)

    def dequantized(self) -> Tensor:
        """The values, FP32 [N, K], each operation rounded by itself."""
        if self.format.is_ternary:
            return (self.codes.float() - self.format.middle) * self.scales
        codes_NGk: Tensor = self.codes.float().unflatten(1, (-1, self.format.group_size))
        scales_NG1 = self.scales.float()[..., None]
        if self.format.offset == "minimum":
            assert self.offsets is not None
            return (codes_NGk * scales_NG1 + self.offsets.float()[..., None]).flatten(1)
        zeros = self.format.middle if self.offsets is None else self.offsets.float()[..., None]
        return ((codes_NGk - zeros) * scales_NG1).flatten(1)

    def rows(self, order: Tensor) -> Self:
        """The rows of these numbers, int64 [n]."""
        offsets = None if self.offsets is None else self.offsets[order]
        scales = self.scales if self.format.is_ternary else self.scales[order]
        return type(self)(self.format, self.codes[order], scales, offsets)

    def columns(self, start: int, stop: int) -> Self:
        """The columns from `start` to `stop`, where groups begin."""
        groups = slice(start // self.format.group_size, stop // self.format.group_size)
        offsets = None if self.offsets is None else self.offsets[:, groups]
        scales = self.scales if self.format.is_ternary else self.scales[:, groups]
        return type(self)(self.format, self.codes[:, start:stop], scales, offsets)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of one part after those of another."""
        if len(parts) == 1:
            return parts[0]
        offsets = [part.offsets for part in parts if part.offsets is not None]
        return cls(
            parts[0].format,
            torch.cat([part.codes for part in parts]),
            parts[0].scales if parts[0].format.is_ternary else torch.cat([part.scales for part in parts]),
            torch.cat(offsets) if offsets else None,
        )


def _wrong(subject: str, expected: object, found: object) -> InvalidInputError:
    return InvalidInputError(
        f"weights, {subject}", expected=expected, found=found, remedy="Give codes and scales of one format."
    )
