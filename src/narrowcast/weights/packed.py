"""Matrices in few bits, laid out for the kernels: blocks of 16 rows (docs/formats.md).

Shapes: B blocks of 16 rows, C blocks of columns, N rows, K columns, G groups of columns, T tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from narrowcast.codecs.kernels import cpu
from narrowcast.errors import InvalidInputError
from narrowcast.weights.arena import Arena
from narrowcast.weights.formats import GroupedCodes, WeightFormat
from narrowcast.weights.parts import span

BLOCK_ROWS = 16
VALUES_AT_A_TIME = 1 << 19
KINDS = {(4, "middle"): 0, (4, "minimum"): 1, (8, "middle"): 2, (4, "zero_point"): 3, (2, "middle"): 4}
EIGHT = ([0, 4, 1, 5], [2, 6, 3, 7])  # columns in the low and high halves of four bytes: two columns meet in a step
ALL = slice(None)


class PackedMatrix:
    """A matrix [N, K] in few bits. `blocks`: uint8 [B, C, bytes], which may be a file's, mapped.

    Raises InvalidInputError where K is not a whole number of groups.
    """

    def __init__(
        self,
        form: WeightFormat,
        shape: tuple[int, int],
        blocks: Tensor,
        *,
        bf16_scales: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.format, self.shape, self.blocks = form, shape, blocks
        self.bf16_scales, self.scale = bf16_scales, scale

    @classmethod
    def empty(
        cls,
        form: WeightFormat,
        shape: tuple[int, int],
        *,
        bf16_scales: bool = False,
        scale: float = 1.0,
        arena: Arena | None = None,
    ) -> Self:
        """Room for a matrix, which `fill` fills; in an arena, if there is one."""
        num_rows, num_columns = shape
        if num_columns % form.group_size:
            raise InvalidInputError(
                f"a matrix of {num_rows} x {num_columns}",
                expected=f"columns in whole groups of {form.group_size}",
                found=f"{num_columns} columns",
                remedy="Take another format for it.",
            )
        size = packed_shape(form, shape)
        blocks = torch.empty(size, dtype=torch.uint8) if arena is None else arena.room(prod(size)).view(size)
        return cls(form, shape, blocks, bf16_scales=bf16_scales, scale=scale)

    @classmethod
    def pack(cls, codes: GroupedCodes) -> Self:
        """All rows of a matrix."""
        num_rows, num_columns = codes.codes.shape
        scale = float(codes.scales) if codes.format.is_ternary else 1.0
        bf16_scales = codes.scales.dtype == torch.bfloat16
        packed = cls.empty(codes.format, (num_rows, num_columns), bf16_scales=bf16_scales, scale=scale)
        packed.fill(0, codes)
        return packed

    def fill(self, first_row: int, codes: GroupedCodes) -> None:
        """Take rows from `first_row` on, a multiple of 16; their number is one too, unless they are the last ones."""
        assert codes.format == self.format and first_row % BLOCK_ROWS == 0
        missing = -len(codes.codes) % BLOCK_ROWS
        assert not missing or first_row + len(codes.codes) == self.shape[0]
        blocks = _blocks(codes, missing)
        self.blocks[first_row // BLOCK_ROWS :][: len(blocks)] = blocks

    def check_columns(self, name: str, own: slice, tp_size: int) -> None:
        """InvalidInputError where a rank's columns of layer `name` are not whole groups."""
        check_columns(name, self.format, own, self.shape[1], tp_size)

    @functools.cached_property
    def native(self) -> Any:
        """The matrix in C++."""
        assert cpu.native is not None
        kind = KINDS[self.format.num_bits, self.format.offset]
        row_nbytes, address = self.blocks.stride(0), self.blocks.data_ptr()
        group_size = self.format.group_size
        return cpu.native.packed(kind, address, row_nbytes, self.shape[0], group_size, self.bf16_scales, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.blocks.numel()

    def is_like(self, other: Self) -> bool:
        """True for a matrix that may stand above the other one in a larger one."""
        kinds = [(each.format, each.shape[1], each.bf16_scales, each.scale) for each in (self, other)]
        return kinds[0] == kinds[1]

    @classmethod
    def joined(cls, parts: Sequence[Self], arena: Arena) -> "list[Self] | None":
        """The matrix of all rows of alike ones in an arena, and they as its parts: in whole blocks but for the last.

        Parts that follow each other stay where they are; None for those of one file or arena that do not.
        """
        first, num_rows = parts[0], [part.shape[0] for part in parts]
        if len(parts) > 1 and all(part.shares_memory_with(first) for part in parts):
            blocks = _behind_each_other([part.blocks for part in parts])
            return None if blocks is None else [first._of(sum(num_rows), blocks), *parts]
        blocks = torch.cat([part.blocks for part in parts], out=_room(arena, parts))
        own = blocks.split([len(part.blocks) for part in parts])
        return [first._of(sum(num_rows), blocks), *(map(first._of, num_rows, own))]

    def shares_memory_with(self, other: Self) -> bool:
        """True for parts of one matrix or of one file."""
        storages = [each.blocks.untyped_storage().data_ptr() for each in (self, other)]
        return storages[0] == storages[1]

    def _of(self, num_rows: int, blocks: Tensor) -> Self:
        """A matrix that is like this one, of other blocks."""
        shape = num_rows, self.shape[1]
        return type(self)(self.format, shape, blocks, bf16_scales=self.bf16_scales, scale=self.scale)

    def of_blocks(self, blocks: Tensor) -> Self:
        """The matrix of some blocks of 16 rows, by their numbers."""
        return self._of(len(blocks) * BLOCK_ROWS, self.blocks[blocks])

    def part(self, rows: slice, columns: slice) -> Self | None:
        """The matrix of some rows and columns, which shares this one's memory; None unless these are whole blocks."""
        per_block, _ = _block(self.format)
        sizes = BLOCK_ROWS, per_block
        spans = [span(part, size) for part, size in zip((rows, columns), self.shape, strict=True)]
        if any(
            place % size and place != end
            for pair, size, end in zip(spans, sizes, self.shape, strict=True)
            for place in pair
        ):
            return None
        (top, bottom), (left, right) = spans
        blocks = self.blocks[top // BLOCK_ROWS : -(-bottom // BLOCK_ROWS), left // per_block : -(-right // per_block)]
        shape = bottom - top, right - left
        return type(self)(self.format, shape, blocks, bf16_scales=self.bf16_scales, scale=self.scale)

    def unpacked(self, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        """Codes and scales of rows, and of columns in whole groups."""
        start, stop, _ = rows.indices(self.shape[0])
        first = start // BLOCK_ROWS
        whole = _unpack(self, self.blocks[first : -(-stop // BLOCK_ROWS)])
        kept, (left, right, _) = (
            slice(start - first * BLOCK_ROWS, stop - first * BLOCK_ROWS),
            columns.indices(self.shape[1]),
        )
        groups = slice(left // self.format.group_size, right // self.format.group_size)
        codes, scales = whole.codes[kept, left:right], whole.scales
        if not self.format.is_ternary:
            scales = scales[kept, groups]
        return GroupedCodes(self.format, codes, scales, None if whole.offsets is None else whole.offsets[kept, groups])


def rows_at_a_time(rows: slice, num_columns: int) -> Iterator[slice]:
    """Parts of some rows, in whole blocks from their beginning, some MB of values each; one at least, if empty."""
    step = max(1, VALUES_AT_A_TIME // num_columns // BLOCK_ROWS) * BLOCK_ROWS
    starts = range(rows.start, max(rows.stop, rows.start + 1), step)
    return (slice(start, min(start + step, rows.stop)) for start in starts)


def check_columns(name: str, form: WeightFormat, own: slice, num_columns: int, tp_size: int) -> None:
    """InvalidInputError where the columns `own` of a rank, of all those of layer `name`, are not whole groups."""
    if own.start % form.group_size or own.stop % form.group_size:
        raise InvalidInputError(
            f"tp_size {tp_size}",
            expected=f"ranks that hold whole groups of {form.group_size} of the {num_columns} columns of {name}",
            found=f"columns {own.start} to {own.stop}",
            remedy="Choose another tp_size, or weights in other groups.",
        )


def _room(arena: Arena, parts: Sequence[PackedMatrix]) -> Tensor:
    num_blocks, shape = sum(len(part.blocks) for part in parts), parts[0].blocks.shape[1:]
    return arena.room(num_blocks * shape.numel()).view(num_blocks, *shape)


def _behind_each_other(parts: Sequence[Tensor]) -> Tensor | None:
    """The blocks of all parts [B, C, bytes] of one storage; None unless nothing lies in between."""
    place = parts[0].storage_offset()
    for part in parts:
        if part.storage_offset() != place or not part.is_contiguous():
            return None
        place += part.numel()
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def packed_shape(form: WeightFormat, shape: tuple[int, int]) -> tuple[int, int, int]:
    """[B, C, bytes] of a matrix [N, K]."""
    per_block, nbytes = _block(form)
    return -(-shape[0] // BLOCK_ROWS), -(-shape[1] // per_block), nbytes


def _block(form: WeightFormat) -> tuple[int, int]:
    """Columns of a block, and the bytes of 16 rows of them."""
    if form.is_ternary:
        return form.group_size, BLOCK_ROWS * form.group_size // 4
    if form.offset == "zero_point":
        return form.group_size, BLOCK_ROWS * (4 + form.group_size // 2)
    header = 128 if form.offset == "minimum" else 64
    return 64, header + BLOCK_ROWS * 8 * form.num_bits


def _blocks(codes: GroupedCodes, missing: int) -> Tensor:
    """Bytes [B, C, bytes] of rows, with as many more that are zero."""
    form = codes.format
    by_block_BRK = pad(codes.codes, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK_ROWS))
    if form.is_ternary:
        quads = by_block_BRK.unflatten(2, (-1, 2, 4, 4))  # two vectors of four quads of columns
        packed: Tensor = quads[..., 0, :] | quads[..., 1, :] << 2 | quads[..., 2, :] << 4 | quads[..., 3, :] << 6
        return packed.permute(0, 2, 3, 1, 4).flatten(2)
    scales = _headers(codes.scales, missing)
    if form.offset == "zero_point":
        assert codes.offsets is not None
        zeros = _headers((codes.offsets.float() - form.middle).to(codes.scales.dtype), missing)
        eights = by_block_BRK.unflatten(2, (-1, form.group_size // 8, 8))
        packed = eights[..., EIGHT[0]] | eights[..., EIGHT[1]] << 4
        return torch.cat([scales, zeros, packed.permute(0, 2, 3, 1, 4).flatten(2)], dim=2)
    parts = [scales] if codes.offsets is None else [scales, _headers(codes.offsets, missing)]
    quads = by_block_BRK.unflatten(2, (-1, 8, 4))
    if form.num_bits == 4:
        quads = quads[..., :4, :] | quads[..., 4:, :] << 4
    parts.append(quads.permute(0, 2, 3, 1, 4).flatten(2))
    odd = parts[0].shape[1] % 2  # two groups to a block: the last one may be nothing but its scale, zero
    return torch.cat([pad(part, (0, 0, 0, odd)).unflatten(1, (-1, 2)).flatten(2) for part in parts], dim=2)


def _headers(numbers_NG: Tensor, missing: int) -> Tensor:
    """Bytes [B, G, 32] of what every row has of each group."""
    padded: Tensor = pad(numbers_NG, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK_ROWS))
    return padded.transpose(1, 2).contiguous().view(torch.uint8)


def _unpack(matrix: PackedMatrix, blocks: Tensor) -> GroupedCodes:
    """The numbers that `_blocks` has made bytes of, of all columns; rows that were missing are there."""
    form, num_columns = matrix.format, matrix.shape[1]
    if form.is_ternary:
        packed = blocks.unflatten(2, (2, BLOCK_ROWS, 4)).permute(0, 3, 1, 2, 4)
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
        return GroupedCodes(form, codes.flatten(2).flatten(0, 1), torch.tensor([[matrix.scale]]))
    dtype = torch.bfloat16 if matrix.bf16_scales else torch.float16
    if form.offset == "zero_point":
        scales, zeros, bytes_ = blocks.split([32, 32, blocks.shape[2] - 64], dim=2)
        packed = bytes_.unflatten(2, (-1, BLOCK_ROWS, 4)).permute(0, 3, 1, 2, 4)
        codes = torch.empty(*packed.shape[:-1], 8, dtype=torch.uint8)
        codes[..., EIGHT[0]], codes[..., EIGHT[1]] = packed & 15, packed >> 4
        points = (_numbers(zeros, dtype).float() + form.middle).to(torch.uint8)
        return GroupedCodes(form, codes.flatten(2).flatten(0, 1), _numbers(scales, dtype), points)
    num_groups = num_columns // form.group_size
    header = 32 * 2 if form.offset == "middle" else 32 * 4
    heads, bytes_ = blocks[..., :header], blocks[..., header:]
    packed = bytes_.unflatten(2, (2, -1, BLOCK_ROWS, 4)).flatten(1, 2).permute(0, 3, 1, 2, 4)
    quads = packed if form.num_bits == 8 else torch.cat([packed & 15, packed >> 4], dim=3)
    codes = quads.flatten(2).flatten(0, 1)[:, :num_columns]
    numbers = [
        _numbers(part.unflatten(2, (2, 32)).flatten(1, 2), dtype)[:, :num_groups] for part in heads.split(64, dim=2)
    ]
    return GroupedCodes(form, codes, *numbers)


def _numbers(bytes_BGb: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [N, G] from bytes [B, G, 32]."""
    return bytes_BGb.contiguous().view(dtype).transpose(1, 2).flatten(0, 1)
