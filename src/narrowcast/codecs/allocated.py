"""`allocated`: a scale for each token, and for each feature as many bits as it deserves, 0 to 8 or BF16.

A token's values are divided by static scales of their features and by one scale of the token, which is found in the
token and takes a byte; what is left is coded by Lloyd-Max quantizers of the normal distribution. Features come in
blocks of 32 that share a width: which features, and how wide, is calibrated for each source (rank), so that outliers
need no special case, and what does not matter is not sent.

A token that reaches far beyond its calibrated ranges is guarded: its farthest values travel as they are, in the place
of the narrowest blocks. docs/formats.md says what every byte means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from narrowcast.codecs import lloyd_max, ops, token_scale
from narrowcast.codecs.allocation import AS_BF16, BLOCK
from narrowcast.codecs.base import Codec, is_positive
from narrowcast.codecs.kernels import cpu
from narrowcast.codecs.token_scale import GUARDED, LARGEST, NOT_FINITE, TOKEN_SCALES, mean_square, scale_code
from narrowcast.errors import InvalidInputError

REACH = 8.0  # calibrated standard deviations beyond which a value is far from what was seen
MAX_ESCAPES, ESCAPE_NBYTES = 15, 4  # values of a guarded token that travel as they are: uint16 feature, BF16 value
NO_FEATURE = 0xFFFF


@ops.operator(
    "allocated_encode(Tensor x, Tensor reciprocal, Tensor order, Tensor widths, int num_escapes, Tensor(a!) out,"
    " Tensor(b!)? stats) -> ()"
)
def allocated_encode(
    x_TE: Tensor,
    reciprocal_E: Tensor,
    order_E: Tensor,
    widths_N: Tensor,
    num_escapes: int,
    out_TB: Tensor,
    stats: Tensor | None,
) -> None:
    """Find the tokens' scales, take out what is far beyond them where the guard can, code block by block."""
    x_TE = x_TE.float()
    layout = _layout(widths_N, len(order_E))
    u_TE = x_TE * reciprocal_E
    verbatim = order_E[: layout.num_bf16]
    u_TE[:, verbatim] = 0.0
    scaled = order_E[layout.num_bf16 : layout.num_coded]
    bad_TE = ops.not_finite(x_TE)
    is_bad = bad_TE.any(dim=1)
    u_TE = u_TE.masked_fill(is_bad[:, None], 0.0)
    codes = scale_code(mean_square(u_TE[:, scaled]))
    far_TE = u_TE.abs() > REACH * TOKEN_SCALES.to(x_TE.device)[codes][:, None]
    is_guarded = far_TE.any(dim=1) & (num_escapes > 0)

    escapes = torch.zeros(len(x_TE), 0, dtype=torch.uint8, device=x_TE.device)
    if num_escapes:
        farness_TE = u_TE.abs().masked_fill(~far_TE, 0.0)
        farthest = farness_TE.sort(dim=1, descending=True, stable=True)
        places, taken = farthest.indices[:, :num_escapes], farthest.values[:, :num_escapes] > 0
        escapes = _escapes(places, taken, x_TE, num_escapes)
        u_TE = u_TE.scatter(1, places, u_TE.gather(1, places).masked_fill(taken, 0.0))
        codes = torch.where(is_guarded, scale_code(mean_square(u_TE[:, scaled])), codes)
    token_scale = TOKEN_SCALES.to(x_TE.device)[codes]
    if stats is not None:
        stats[ops.SATURATED] += (u_TE.abs() > REACH * token_scale[:, None]).count_nonzero()
        stats[ops.NON_FINITE] += bad_TE.count_nonzero()
        stats[ops.GUARDED] += is_guarded.count_nonzero()
    reciprocal_T = torch.where(token_scale > 0, 1.0 / token_scale, 0.0)
    blocks_TB = _pack_blocks(x_TE, u_TE * reciprocal_T[:, None], order_E, layout)

    head = codes.masked_fill(is_bad, NOT_FINITE).to(torch.uint8)[:, None]
    rows = torch.cat([head, blocks_TB.masked_fill(is_bad[:, None], 0)], dim=1)
    out_TB.zero_()
    out_TB[:, : rows.shape[1]] = rows
    if is_guarded.any():
        kept = layout.nbytes_that_fit(out_TB.shape[1] - 2 - escapes.shape[1])
        rows = torch.cat([torch.full_like(head, GUARDED), head, escapes, blocks_TB[:, :kept]], dim=1)
        out_TB[is_guarded] = 0
        out_TB[is_guarded, : rows.shape[1]] = rows[is_guarded]


@ops.operator(
    "allocated_decode_sum(Tensor payloads, Tensor scale, Tensor order, Tensor widths, int num_escapes, Tensor(a!) out)"
    " -> ()"
)
def allocated_decode_sum(
    payloads_RTB: Tensor,
    scale_RE: Tensor,
    order_RE: Tensor,
    widths_RN: Tensor,
    num_escapes: int,
    out_TE: Tensor,
) -> None:
    """Decode each rank's payload with its own blocks and sum in fp32, in rank order, from zero on."""
    decoded = [torch.zeros(out_TE.shape, device=out_TE.device)]
    for payload_TB, scale_E, order_E, widths_N in zip(payloads_RTB, scale_RE, order_RE, widths_RN, strict=True):
        layout = _layout(widths_N, len(order_E))
        head = payload_TB[:, 0].long()
        values_TE = _values(payload_TB[:, 1:], head, scale_E, order_E, layout, layout.nbytes)
        is_guarded = (head == GUARDED) & (num_escapes > 0)
        if is_guarded.any():
            rows = payload_TB[is_guarded]
            start = 2 + ESCAPE_NBYTES * num_escapes
            kept = layout.nbytes_that_fit(payload_TB.shape[1] - start)
            rest_TE = _values(rows[:, start:], rows[:, 1].long(), scale_E, order_E, layout, kept)
            values_TE[is_guarded] = _with_escapes(rest_TE, rows[:, 2:start])
        decoded.append(values_TE)
    ops.store_sum(decoded, out_TE)


@dataclass(frozen=True)
class Layout:
    """Where the blocks of one source stand in its rows: `blocks` holds (first slot, slots, width), bytes in order."""

    blocks: tuple[tuple[int, int, int], ...]

    @property
    def num_bf16(self) -> int:
        """Slots of blocks that are sent as they are; they come first."""
        return sum(count for _, count, width in self.blocks if width == AS_BF16)

    @property
    def num_coded(self) -> int:
        """Slots of blocks that are sent at all."""
        return sum(count for _, count, _ in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(width_nbytes(width) for _, _, width in self.blocks)

    def nbytes_that_fit(self, room: int) -> int:
        """Bytes of the first blocks, as many as fit."""
        total = 0
        for _, _, width in self.blocks:
            if total + width_nbytes(width) > room:
                break
            total += width_nbytes(width)
        return total


def width_nbytes(width: int) -> int:
    """Bytes of a block."""
    return BLOCK // 8 * width


def _layout(widths_N: Tensor, num_features: int) -> Layout:
    widths = widths_N.tolist()
    return Layout(
        tuple(
            (BLOCK * place, min(BLOCK, num_features - BLOCK * place), width)
            for place, width in enumerate(widths)
            if width
        )
    )


def _pack_blocks(x_TE: Tensor, q_TE: Tensor, order_E: Tensor, layout: Layout) -> Tensor:
    """All blocks' bytes: codes of `q_TE`, sign above magnitude, or `x_TE` in BF16; zeros where a block has no value."""
    parts = [q_TE.new_zeros(len(q_TE), 0, dtype=torch.uint8)]
    for first, count, width in layout.blocks:
        own = order_E[first : first + count]
        if width == AS_BF16:
            rounded = torch.nn.functional.pad(x_TE[:, own].bfloat16(), (0, BLOCK - count))
            parts.append(rounded.masked_fill(ops.not_finite(rounded), torch.nan).view(torch.uint8))
            continue
        q_TN = q_TE[:, own].contiguous()
        codes = torch.bucketize(q_TN.abs(), lloyd_max.edges(width).to(q_TN.device), right=True)
        codes |= (q_TN < 0).long() << width - 1
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, BLOCK - count))
        parts.append(ops.pack(padded, width))
    return torch.cat(parts, dim=1)


def _values(blocks_TB: Tensor, codes: Tensor, scale_E: Tensor, order_E: Tensor, layout: Layout, nbytes: int) -> Tensor:
    """Values [T, E] of the blocks in the first `nbytes`; codes of scales that stand for no number give NaN."""
    token_scale = TOKEN_SCALES.to(blocks_TB.device)[codes]
    values_TE = torch.zeros(len(blocks_TB), len(order_E), device=blocks_TB.device)
    start = 0
    for first, count, width in layout.blocks:
        stop = start + width_nbytes(width)
        if stop > nbytes:
            break
        own, bytes_TB = order_E[first : first + count], blocks_TB[:, start:stop]
        if width == AS_BF16:
            values_TE[:, own] = ops.values(bytes_TB, torch.bfloat16)[:, :count]
        else:
            block_codes = ops.unpack(bytes_TB, width, BLOCK)[:, :count].long()
            positive = lloyd_max.levels(width).to(blocks_TB.device)
            level = torch.cat([positive, -positive])[block_codes]
            values_TE[:, own] = level * scale_E[own].float() * token_scale[:, None]
        start = stop
    return values_TE.masked_fill((codes > LARGEST)[:, None], torch.nan)


def _escapes(places: Tensor, taken: Tensor, x_TE: Tensor, num_escapes: int) -> Tensor:
    """Bytes [T, 4 * num_escapes] of the values that travel as they are: all features' numbers, then all values."""
    features = torch.where(taken, places, NO_FEATURE)
    values = x_TE.gather(1, places).masked_fill(~taken, 0.0)
    missing = num_escapes - places.shape[1]  # fewer features than escapes
    features = torch.nn.functional.pad(features, (0, missing), value=NO_FEATURE)
    values = torch.nn.functional.pad(values, (0, missing))
    low_high = torch.stack([features & 0xFF, features >> 8], dim=-1).to(torch.uint8).flatten(1)
    largest = torch.finfo(torch.bfloat16).max  # finite stays finite
    return torch.cat([low_high, values.clamp(-largest, largest).bfloat16().view(torch.uint8)], dim=1)


def _with_escapes(values_TE: Tensor, escapes_TB: Tensor) -> Tensor:
    num_bytes = escapes_TB.shape[1] // 2
    low_high = escapes_TB[:, :num_bytes].long()
    features = low_high[:, ::2] | low_high[:, 1::2] << 8
    values = ops.values(escapes_TB[:, num_bytes:], torch.bfloat16)
    num_features = values_TE.shape[1]
    wide = torch.nn.functional.pad(values_TE, (0, 1))  # whatever names no feature goes into the last column
    return wide.scatter(1, features.clamp(max=num_features), values)[:, :num_features]


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocatedCodec(Codec):
    """Blocks of 32 features of 0 to 8 bits or BF16, static scales, and one scale of a byte for each token.

    `scale`: bf16 [R, E], positive: what a feature's values are divided by, some standard deviation. `order`: int32
    [R, E], each source's features, block by block. `widths`: uint8 [R, ceil(E / 32)], bits of each block, never
    rising, 16 for BF16. All sources' rows take as many bytes as the longest.
    """

    id: ClassVar[str] = "allocated"
    scale: Tensor
    order: Tensor
    widths: Tensor

    def __post_init__(self) -> None:
        num_sources, num_features = self.scale.shape
        shape = num_sources, -(-num_features // BLOCK)
        if self.scale.dtype != torch.bfloat16 or not is_positive(self.scale):
            raise _misfit("scales [sources, features] in bf16, finite, positive and normal", self.scale)
        in_order = torch.arange(num_features, dtype=torch.int32, device=self.order.device)
        if self.order.dtype != torch.int32 or not torch.equal(
            self.order.sort(dim=1).values, in_order.expand(num_sources, -1)
        ):
            raise _misfit(f"an order of {num_features} features for each source, in int32", self.order)
        fits = self.widths.dtype == torch.uint8 and self.widths.shape == shape
        known = fits and bool(((self.widths <= lloyd_max.MAX_BITS) | (self.widths == AS_BF16)).all())
        if not known or bool((self.widths.int().diff(dim=1) > 0).any()) or num_features >= NO_FEATURE:
            raise _misfit(f"falling widths {list(shape)} of 0 to 8 or 16 bits, in uint8", self.widths)

    @cached_property
    def num_sources(self) -> int:
        return len(self.scale)

    @property
    def granularity(self) -> None:
        return None  # a token's scale is of all its features

    @property
    def nan_reach(self) -> None:
        return None

    @cached_property
    def _row_nbytes(self) -> int:
        return 1 + width_nbytes(int(self.widths.int().sum(dim=1).max()))

    @cached_property
    def num_escapes(self) -> int:
        """Values of a guarded token that travel as they are: half of the row's bytes at most."""
        return min(MAX_ESCAPES, max(0, (self._row_nbytes - 2) // (2 * ESCAPE_NBYTES)))

    @cached_property
    def _reciprocal(self) -> Tensor:
        return 1.0 / self.scale.float()

    def row_nbytes(self, num_features: int) -> int:
        if num_features != self.scale.shape[1]:
            raise InvalidInputError(
                "allocated codec",
                expected=f"{self.scale.shape[1]} features, as calibrated",
                found=num_features,
                remedy="Use the codec of this site.",
            )
        return self._row_nbytes

    def num_features(self, row_nbytes: int) -> int:
        return self.scale.shape[1]

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        torch.ops.narrowcast.allocated_encode(
            x_TE, self._reciprocal[source], self.order[source], self.widths[source], self.num_escapes, out_TB, stats
        )

    def _decode_sum(self, payloads_RTB: Tensor, sources: slice, out_TE: Tensor) -> None:
        torch.ops.narrowcast.allocated_decode_sum(
            payloads_RTB, self.scale[sources], self.order[sources], self.widths[sources], self.num_escapes, out_TE
        )

    def _make_kernel(self) -> cpu.Kernel | None:
        tables = *token_scale.tables(), *lloyd_max.tables()
        reciprocal_RE = self._reciprocal.masked_fill(self._is_bf16, 0.0)
        sizes = self.num_escapes, self._row_nbytes
        return cpu.allocated(self.scale, reciprocal_RE, self.order, self.widths, *sizes, tables)

    @property
    def _is_bf16(self) -> Tensor:
        """Which features of which source [R, E] are sent as they are."""
        by_slot = self.widths.repeat_interleave(BLOCK, dim=1)[:, : self.order.shape[1]] == AS_BF16
        return torch.zeros_like(by_slot).scatter(1, self.order.long(), by_slot)

    def _features(self, start: int, stop: int) -> "AllocatedCodec":
        if stop - start == self.scale.shape[1]:
            return self
        assert start == stop, "a token's features stay together"
        return AllocatedCodec(scale=self.scale[:, :0], order=self.order[:, :0], widths=self.widths[:, :0])

    def _sources(self, ranks: tuple[int, ...]) -> "AllocatedCodec":
        chosen = list(ranks)
        return AllocatedCodec(scale=self.scale[chosen], order=self.order[chosen], widths=self.widths[chosen])

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        # A value inside the outermost edges errs by half of the widest cell between two levels at most, or by the
        # distance from the lowest level, twice which is the cell around zero; one beyond them by its distance from
        # the outermost level. What is not sent, or stands in a guarded token, may err by its magnitude or by what it
        # is decoded to. The products carry three roundings (3 * 2**-24, relative).
        x_TE, scale_E = x_TE.float().abs(), self.scale[source].float()
        order_E, layout = self.order[source], _layout(self.widths[source], self.scale.shape[1])
        u_TE = x_TE * self._reciprocal[source]
        codes = scale_code(mean_square(u_TE[:, order_E[layout.num_bf16 : layout.num_coded]]))
        token_scale = TOKEN_SCALES[codes][:, None]
        bound_TE = x_TE.clone()
        for first, count, width in layout.blocks:
            own = order_E[first : first + count]
            if width == AS_BF16:
                bound_TE[:, own] = (x_TE[:, own] * (torch.finfo(torch.bfloat16).eps / 2)).clamp(min=2.0**-134)
                continue
            positive = lloyd_max.levels(width)
            steps = torch.cat([positive[:1] * 2, positive.diff()])
            unit_TN = scale_E[own] * token_scale
            inside_TN = unit_TN * (steps.max() / 2)
            beyond_TN = x_TE[:, own] - unit_TN * positive[-1]
            bound_TE[:, own] = torch.maximum(inside_TN, beyond_TN) * (1 + 2**-21) + x_TE[:, own] * 2**-21
        is_guarded = (u_TE > REACH * token_scale).any(dim=1, keepdim=True)
        return torch.where(is_guarded, torch.maximum(bound_TE, x_TE) * (1 + 2**-8), bound_TE + 2.0**-134)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"scale": self.scale, "order": self.order, "widths": self.widths}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(scale=tensors["scale"], order=tensors["order"], widths=tensors["widths"])


def _misfit(expected: str, found: Tensor) -> InvalidInputError:
    return InvalidInputError(
        "allocated codec",
        expected=expected,
        found=f"{list(found.shape)} in {found.dtype}",
        remedy="Calibrate again.",
    )
