"""`transform`: features travel as components along calibrated axes, which `allocated` codes.

Below 3 bits a value it matters less how features are coded than what is coded. A rank's partial sums span few
dimensions, and the loss minds errors in some directions far more than in others: along the right axes most components
deserve no bits at all, and are not even made. docs/method.md derives the axes.

Analysis and synthesis are matrix products, ordinary model arithmetic: of another number of tokens or threads they may
be rounded otherwise, in the last place.

Shapes: A sets of axes, N blocks of B features, K components of each block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from narrowcast.codecs.allocated import AllocatedCodec
from narrowcast.codecs.base import Codec
from narrowcast.codecs.tables import PerDevice
from narrowcast.errors import InvalidInputError


class Matrices(NamedTuple):
    """Both ways in FP32, as they are multiplied by."""

    analysis: Tensor
    synthesis: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformCodec(Codec):
    """Components `analysis @ features`, coded; what comes back is `synthesis @ components`.

    `analysis`: bf16 [A, N, K, B], `synthesis`: bf16 [A, N, B, K]. A is 1, or the number of sources, each of which has
    axes of its own; `size` features are cut into N blocks of B, of which zeros may fill the last one. `components`:
    the codec of the N * K components.
    """

    id: ClassVar[str] = "transform"
    by_token: ClassVar[bool] = False
    size: int
    analysis: Tensor
    synthesis: Tensor
    components: AllocatedCodec

    def __post_init__(self) -> None:
        shape = self.analysis.shape
        fits = (
            self.analysis.dtype is self.synthesis.dtype is torch.bfloat16
            and len(shape) == 4
            and self.synthesis.shape == (shape[0], shape[1], shape[3], shape[2])
            and shape[0] in (1, self.components.num_sources)
            and shape[1] * shape[2] == self.num_components
            and shape[1] * shape[3] - shape[3] < self.size <= shape[1] * shape[3]
            and bool(self.analysis.isfinite().all() and self.synthesis.isfinite().all())
        )
        if not fits:
            raise InvalidInputError(
                "transform codec",
                expected=f"finite matrices in bf16 between {self.size} features and the components of its codec",
                found=f"{list(shape)} and {list(self.synthesis.shape)}, {self.num_components} components",
                remedy="Calibrate again.",
            )

    @property
    def num_sources(self) -> int:
        return self.components.num_sources

    @property
    def granularity(self) -> None:
        return None  # a component is made of all features

    @property
    def nan_reach(self) -> None:
        return None

    @property
    def axes(self) -> Literal["ranks", "site", "blocks"]:
        """Whose they are: each source's own, or one set for all, over all features or within blocks of them."""
        if len(self.analysis) > 1:
            return "ranks"
        return "site" if self.analysis.shape[1] == 1 else "blocks"

    @property
    def feeds_back(self) -> bool:
        # What one sum lost lies outside of what a rank's own axes at the next one span: they would have to be wider.
        return self.axes != "ranks"

    @property
    def num_components(self) -> int:
        """Components that are made of a token; some sources may not send all of them."""
        return self.components.calibrated_features

    @property
    def calibrated_features(self) -> int:
        return self.size

    def row_nbytes(self, num_features: int) -> int:
        if num_features != self.size:
            raise InvalidInputError(
                "transform codec",
                expected=f"{self.size} features, as calibrated",
                found=num_features,
                remedy="Use the codec of this site.",
            )
        return self.components.row_nbytes(self.num_components)

    def num_features(self, row_nbytes: int) -> int:
        return self.size

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        self.components.encode(self._analyzed(x_TE.float(), source), source=source, out=out_TB, stats=stats)

    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        sources = range(first_source, first_source + len(payloads_RTB))
        if self.axes == "ranks":
            total_TE = torch.zeros(out_TE.shape, dtype=torch.float32, device=out_TE.device)
            for payload_TB, source in zip(payloads_RTB, sources, strict=True):
                total_TE += self._synthesized(self.components.decode(payload_TB, source=source), source)
        else:
            components = self.components.sources(tuple(sources))
            total_TE = self._synthesized(components.decode_sum(payloads_RTB), 0)
        out_TE.copy_(total_TE)

    @cached_property
    def _matrices(self) -> PerDevice[Matrices]:
        return PerDevice(Matrices(self.analysis.float(), self.synthesis.float()))

    def _analyzed(self, x_TE: Tensor, source: int) -> Tensor:
        """The components [T, N * K] of features."""
        analysis = self._matrices.on(x_TE.device).analysis[source if self.axes == "ranks" else 0]
        if len(analysis) == 1:
            return torch.nn.functional.linear(x_TE, analysis[0])
        missing = len(analysis) * analysis.shape[2] - self.size
        blocks_TNB = torch.nn.functional.pad(x_TE, (0, missing)).unflatten(1, (len(analysis), -1))
        return torch.einsum("tnb,nkb->tnk", blocks_TNB, analysis).flatten(1)

    def _synthesized(self, z_TK: Tensor, source: int) -> Tensor:
        """The features [T, E] of components."""
        synthesis = self._matrices.on(z_TK.device).synthesis[source if self.axes == "ranks" else 0]
        if len(synthesis) == 1:
            return torch.nn.functional.linear(z_TK, synthesis[0])
        found = torch.einsum("tnk,nbk->tnb", z_TK.unflatten(1, (len(synthesis), -1)), synthesis)
        return found.flatten(1)[:, : self.size]

    def _features(self, start: int, stop: int) -> "TransformCodec":
        assert (start, stop) == (0, self.size), "a token's features stay together"
        return self

    def _sources(self, ranks: tuple[int, ...]) -> "TransformCodec":
        chosen = list(ranks) if self.axes == "ranks" else [0]
        return TransformCodec(
            size=self.size,
            analysis=self.analysis[chosen],
            synthesis=self.synthesis[chosen],
            components=self.components._sources(ranks),
        )

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        # What the axes leave out is lost; what coding loses of a component spreads over features as the synthesis has
        # it. Products of B or K terms carry as many roundings, of the sums of their magnitudes.
        x_TE = x_TE.float()
        z_TK = self._analyzed(x_TE, source)
        absolute = TransformCodec(
            size=self.size, analysis=self.analysis.abs(), synthesis=self.synthesis.abs(), components=self.components
        )
        size_TK = absolute._analyzed(x_TE.abs(), source)
        roundings = 2**-24 * (sum(self.analysis.shape[2:]) + 8)
        lost_TK = self.components.error_bound(z_TK, source=source) + roundings * size_TK
        bound_TE = (x_TE - self._synthesized(z_TK, source)).abs()
        return bound_TE + absolute._synthesized(lost_TK * (1 + roundings) + roundings * size_TK, source)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _, coded = self.components.state()
        return {"size": self.size}, {"analysis": self.analysis, "synthesis": self.synthesis, **coded}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(
            size=config["size"],
            analysis=tensors["analysis"],
            synthesis=tensors["synthesis"],
            components=AllocatedCodec.from_state({}, tensors),
        )
