"""`allocated`: a scale for each token, and for each feature as many bits as it deserves, 0 to 8 or BF16.

A token's values are divided by static scales of their features and by one scale of the token, which is found in the
token and takes a byte; what is left is coded by trellis quantizers of the normal distribution. Features come in
blocks of 32 that share a width: which features, and how wide, is calibrated for each source (rank), so that outliers
need no special case, and what does not matter is not sent.

A token that reaches far beyond its calibrated ranges is guarded: its farthest values travel as they are, in the place
of the narrowest blocks. docs/formats.md says what every byte means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from narrowcast.codecs import trellis
from narrowcast.codecs.allocated_reference import (
    ESCAPE_NBYTES,
    NO_FEATURE,
    REACH,
    Layout,
    allocated_decode_sum,
    allocated_encode,
    width_nbytes,
)
from narrowcast.codecs.allocation import AS_BF16, BLOCK
from narrowcast.codecs.base import Codec, is_positive
from narrowcast.codecs.tables import PerDevice
from narrowcast.codecs.token_scale import TOKEN_SCALES, mean_square, scale_code
from narrowcast.errors import InvalidInputError

MAX_ESCAPES = 15  # values of a guarded token that travel as they are


class AllocatedTables(NamedTuple):
    """Look-ups of kernels: bf16 `scale` and its fp32 `reciprocal` [R, E], int32 `order` [R, E]."""

    scale: Tensor
    reciprocal: Tensor
    order: Tensor


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
        if self.scale.ndim != 2 or self.order.shape != self.scale.shape:
            raise _misfit("scales and an order [sources, features]", self.order)
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
        known = fits and bool(((self.widths <= trellis.MAX_BITS) | (self.widths == AS_BF16)).all())
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

    @property
    def calibrated_features(self) -> int:
        return self.scale.shape[1]

    @cached_property
    def _row_nbytes(self) -> int:
        return 1 + width_nbytes(int(self.widths.int().sum(dim=1).max()))

    @cached_property
    def num_escapes(self) -> int:
        """Values of a guarded token that travel as they are: half of the row's bytes at most."""
        return min(MAX_ESCAPES, max(0, (self._row_nbytes - 2) // (2 * ESCAPE_NBYTES)))

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The places of each source's blocks."""
        return tuple(Layout.of(widths, self.scale.shape[1]) for widths in self.widths.tolist())

    @cached_property
    def tables(self) -> PerDevice[AllocatedTables]:
        """The look-ups of kernels."""
        return PerDevice(AllocatedTables(self.scale, 1.0 / self.scale.float(), self.order))

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
        _, reciprocal_RE, order_RE = self.tables.on(x_TE.device)
        layout = self.layouts[source]
        allocated_encode(x_TE, reciprocal_RE[source], order_RE[source], layout, self.num_escapes, out_TB, stats)

    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        scale_RE, _, order_RE = self.tables.on(payloads_RTB.device)
        own = slice(first_source, first_source + len(payloads_RTB))
        layouts = self.layouts[own]
        allocated_decode_sum(payloads_RTB, scale_RE[own], order_RE[own], layouts, self.num_escapes, out_TE)

    def _features(self, start: int, stop: int) -> "AllocatedCodec":
        if stop - start == self.scale.shape[1]:
            return self
        assert start == stop, "a token's features stay together"
        return AllocatedCodec(scale=self.scale[:, :0], order=self.order[:, :0], widths=self.widths[:, :0])

    def _sources(self, ranks: tuple[int, ...]) -> "AllocatedCodec":
        chosen = list(ranks)
        return AllocatedCodec(scale=self.scale[chosen], order=self.order[chosen], widths=self.widths[chosen])

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        # A value errs by its distance from the nearest level of the subset that the path gives it, any of four. What
        # is not sent, or stands in a guarded token, may err by its magnitude or by what it is decoded to. The products
        # carry three roundings (3 * 2**-24, relative).
        x_TE, scale_E = x_TE.float().abs(), self.scale[source].float()
        order_E, layout = self.order[source], self.layouts[source]
        u_TE = x_TE * self.tables.on(x_TE.device).reciprocal[source]
        codes = scale_code(mean_square(u_TE[:, order_E[layout.num_bf16 : layout.num_coded]]))
        token_scale = TOKEN_SCALES.on(x_TE.device).scales[codes][:, None]
        bound_TE = x_TE.clone()
        for first, count, width in layout.blocks:
            own = order_E[first : first + count]
            if width == AS_BF16:
                bound_TE[:, own] = (x_TE[:, own] * (torch.finfo(torch.bfloat16).eps / 2)).clamp(min=2.0**-134)
                continue
            unit_TN = scale_E[own] * token_scale
            levels_M, q_TN = trellis.levels(width), x_TE[:, own] / unit_TN.clamp(min=torch.finfo(torch.float32).tiny)
            far_TN = torch.zeros_like(q_TN)
            for subset_M in (*trellis.subsets(levels_M), *trellis.subsets(trellis.first_levels(width))):
                far_TN = torch.maximum(far_TN, (q_TN[..., None] - subset_M.to(q_TN.device)).abs().amin(dim=-1))
            bound_TE[:, own] = far_TN * unit_TN * (1 + 2**-20) + x_TE[:, own] * 2**-20
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
