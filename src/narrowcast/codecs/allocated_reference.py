"""The reference kernels of `allocated`.

Nothing here asks what a tensor holds, so that no call waits for a device: where each block stands is a `Layout`, known
on the host, and what only guarded tokens need is computed for all of them, unless they lie on the CPU.

Shapes: N blocks of 32 slots, the last of which may be short.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from narrowcast.codecs import arithmetic, packing, trellis
from narrowcast.codecs.allocation import AS_BF16, BLOCK
from narrowcast.codecs.base import GUARDED, NON_FINITE, SATURATED
from narrowcast.codecs.token_scale import GUARDED as IS_GUARDED
from narrowcast.codecs.token_scale import LARGEST, NOT_FINITE, TOKEN_SCALES, mean_square, scale_code

REACH = 8.0  # calibrated standard deviations beyond which a value is far from what was seen
ESCAPE_NBYTES = 4  # of a guarded token's value that travels as it is: uint16 feature, BF16 value
NO_FEATURE = 0xFFFF


@dataclass(frozen=True)
class Layout:
    """The places of the blocks of one source in its rows: `blocks` holds (first slot, slots, width), bytes in order."""

    blocks: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, widths: list[int], num_features: int) -> "Layout":
        """The layout of blocks of these widths, without those of none."""
        slots = ((BLOCK * place, width) for place, width in enumerate(widths) if width)
        return cls(tuple((first, min(BLOCK, num_features - first), width) for first, width in slots))

    @cached_property
    def num_bf16(self) -> int:
        """Slots of blocks that are sent as they are; they come first."""
        return sum(count for _, count, width in self.blocks if width == AS_BF16)

    @cached_property
    def num_coded(self) -> int:
        """Slots of blocks that are sent at all."""
        return sum(count for _, count, _ in self.blocks)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(width_nbytes(width) for _, _, width in self.blocks)

    def that_fits(self, room: int) -> "Layout":
        """The first blocks, as many as fit into so many bytes."""
        ends = accumulate(width_nbytes(width) for _, _, width in self.blocks)
        return Layout(tuple(block for block, end in zip(self.blocks, ends, strict=True) if end <= room))

    @cached_property
    def coded(self) -> tuple[tuple[int, int, int], ...]:
        """The blocks that are not sent as they are."""
        return tuple(block for block in self.blocks if block[2] != AS_BF16)

    @cached_property
    def widths(self) -> list[int]:
        """Bits of each 16 slots of coded blocks."""
        return [width for _, _, width in self.coded for _ in range(BLOCK // trellis.LANES)]

    @cached_property
    def coded_slots(self) -> slice:
        """The slots of coded blocks that hold a feature."""
        return slice(self.num_bf16, self.num_coded)


def width_nbytes(width: int) -> int:
    """Bytes of a block."""
    return BLOCK // 8 * width


def allocated_encode(
    x_TE: Tensor,
    reciprocal_E: Tensor,
    order_E: Tensor,
    layout: Layout,
    num_escapes: int,
    out_TB: Tensor,
    stats: Tensor | None,
) -> None:
    """Find the tokens' scales, take out what is far beyond them where the guard can, code block by block."""
    x_TE = x_TE.float()
    scales = TOKEN_SCALES.on(x_TE.device).scales
    u_TE = x_TE * reciprocal_E
    verbatim = order_E[: layout.num_bf16]
    u_TE[:, verbatim] = 0.0
    scaled = order_E[layout.num_bf16 : layout.num_coded]
    bad_TE = arithmetic.not_finite(x_TE)
    is_bad = bad_TE.any(dim=1)
    u_TE = u_TE.masked_fill(is_bad[:, None], 0.0)
    codes = scale_code(mean_square(u_TE[:, scaled]))
    far_TE = u_TE.abs() > REACH * scales[codes][:, None]
    is_guarded = far_TE.any(dim=1) & (num_escapes > 0)

    escapes = torch.zeros(len(x_TE), 0, dtype=torch.uint8, device=x_TE.device)
    if num_escapes:
        farness_TE = u_TE.abs().masked_fill(~far_TE, 0.0)
        farthest = farness_TE.sort(dim=1, descending=True, stable=True)
        places, taken = farthest.indices[:, :num_escapes], farthest.values[:, :num_escapes] > 0
        escapes = _escapes(places, taken, x_TE, num_escapes)
        u_TE = u_TE.scatter(1, places, u_TE.gather(1, places).masked_fill(taken, 0.0))
        codes = torch.where(is_guarded, scale_code(mean_square(u_TE[:, scaled])), codes)
    token_scale = scales[codes]
    if stats is not None:
        stats[SATURATED] += (u_TE.abs() > REACH * token_scale[:, None]).count_nonzero()
        stats[NON_FINITE] += bad_TE.count_nonzero()
        stats[GUARDED] += is_guarded.count_nonzero()
    reciprocal_T = torch.where(token_scale > 0, 1.0 / token_scale, 0.0)
    q_TE = u_TE * reciprocal_T[:, None]
    blocks_TB = _pack_blocks(x_TE, q_TE, order_E, layout)

    head = codes.masked_fill(is_bad, NOT_FINITE).to(torch.uint8)[:, None]
    out_TB.copy_(_row([head, blocks_TB.masked_fill(is_bad[:, None], 0)], out_TB.shape[1]))
    if num_escapes and arithmetic.perhaps_any(is_guarded):
        kept_TB = _pack_blocks(x_TE, q_TE, order_E, layout.that_fits(out_TB.shape[1] - 2 - escapes.shape[1]))
        mark = torch.full_like(head, IS_GUARDED)
        guarded_TB = _row([mark, head, escapes, kept_TB], out_TB.shape[1])
        out_TB.copy_(torch.where(is_guarded[:, None], guarded_TB, out_TB))


def allocated_decode_sum(
    payloads_RTB: Tensor,
    scale_RE: Tensor,
    order_RE: Tensor,
    layouts: tuple[Layout, ...],
    num_escapes: int,
    out_TE: Tensor,
) -> None:
    """Decode each rank's payload with its own blocks and sum in fp32, in rank order, from zero on."""
    decoded = [torch.zeros(out_TE.shape, device=out_TE.device)]
    for payload_TB, scale_E, order_E, layout in zip(payloads_RTB, scale_RE, order_RE, layouts, strict=True):
        head = payload_TB[:, 0].long()
        values_TE = _values(payload_TB[:, 1:], head, scale_E, order_E, layout)
        is_guarded = head == IS_GUARDED
        if num_escapes and arithmetic.perhaps_any(is_guarded):
            start = 2 + ESCAPE_NBYTES * num_escapes
            kept, rest_TB = layout.that_fits(payload_TB.shape[1] - start), payload_TB[:, start:]
            rest_TE = _values(rest_TB, payload_TB[:, 1].long(), scale_E, order_E, kept)
            guarded_TE = _with_escapes(rest_TE, payload_TB[:, 2:start])
            values_TE = torch.where(is_guarded[:, None], guarded_TE, values_TE)
        decoded.append(values_TE)
    arithmetic.store_sum(decoded, out_TE)


def _row(parts: list[Tensor], nbytes: int) -> Tensor:
    """Rows of `nbytes`, zeros behind the parts."""
    rows = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(rows, (0, nbytes - rows.shape[1]))


def _pack_blocks(x_TE: Tensor, q_TE: Tensor, order_E: Tensor, layout: Layout) -> Tensor:
    """All blocks' bytes: codes of `q_TE`, or `x_TE` in BF16. Slots without a feature hold what zeros do."""
    parts = [q_TE.new_zeros(len(q_TE), 0, dtype=torch.uint8)]
    for first, count, width in layout.blocks:
        if width == AS_BF16:
            rounded = torch.nn.functional.pad(x_TE[:, order_E[first : first + count]].bfloat16(), (0, BLOCK - count))
            parts.append(rounded.masked_fill(arithmetic.not_finite(rounded), torch.nan).view(torch.uint8))
    own = order_E[layout.coded_slots]
    q_TS = torch.nn.functional.pad(q_TE[:, own], (0, BLOCK * len(layout.coded) - len(own)))
    codes = trellis.encode(q_TS, layout.widths)
    for (_, _, width), block in zip(layout.coded, codes.split(BLOCK, dim=1), strict=False):
        parts.append(packing.pack(block.contiguous(), width))
    return torch.cat(parts, dim=1)


def _values(blocks_TB: Tensor, codes: Tensor, scale_E: Tensor, order_E: Tensor, layout: Layout) -> Tensor:
    """Values [T, E] of the blocks; codes of scales that stand for no number give NaN."""
    token_scale = TOKEN_SCALES.on(blocks_TB.device).scales[codes]
    values_TE = torch.zeros(len(blocks_TB), len(order_E), device=blocks_TB.device)
    start, found = 0, [codes.new_zeros(len(codes), 0, dtype=torch.uint8)]
    for first, count, width in layout.blocks:
        stop = start + width_nbytes(width)
        if width == AS_BF16:
            values = arithmetic.values(blocks_TB[:, start:stop], torch.bfloat16)
            values_TE[:, order_E[first : first + count]] = values[:, :count]
        else:
            found.append(packing.unpack(blocks_TB[:, start:stop], width, BLOCK))
        start = stop
    own = order_E[layout.coded_slots]
    level = trellis.decode(torch.cat(found, dim=1), layout.widths)[:, : len(own)]
    values_TE[:, own] = level * scale_E[own].float() * token_scale[:, None]
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
    values = arithmetic.values(escapes_TB[:, num_bytes:], torch.bfloat16)
    num_features = values_TE.shape[1]
    wide = torch.nn.functional.pad(values_TE, (0, 1))  # whatever names no feature goes into the last column
    return wide.scatter(1, features.clamp(max=num_features), values)[:, :num_features]
