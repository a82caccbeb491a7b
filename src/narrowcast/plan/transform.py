"""Transforms: a site's partial sums travel as components along calibrated axes, and their sum is turned back.

The analysis is folded into the row-parallel weights, so that ranks compute components instead of features, and only
those that are sent; the synthesis is one more matrix product after the sum. Both are ordinary model arithmetic: what
collectives and codecs promise holds for the components.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor

from narrowcast.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Components of the features from `start` on. `rank`: who computes them; None for every rank.

    `analysis`: [K, F], makes K components of F features. `synthesis`: [F, K], makes features of components.
    """

    start: int
    rank: int | None
    analysis: Tensor
    synthesis: Tensor

    @property
    def stop(self) -> int:
        """The end of its features."""
        return self.start + len(self.synthesis)


@dataclass(frozen=True, kw_only=True, eq=False)
class Remix:
    """The axes along which the reduced sum travels again (two_shot), where they are others.

    `mix`: [J, K], makes its J components of the K that were summed; `synthesis`: [E, J].
    """

    mix: Tensor
    synthesis: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """The components of all parts, one after another, in place of `num_features` features."""

    num_features: int
    parts: tuple[Part, ...]
    remix: Remix | None = None

    @cached_property
    def num_components(self) -> int:
        """K: components that are added up over the ranks."""
        return sum(len(part.analysis) for part in self.parts)

    @property
    def num_reduced(self) -> int:
        """Components of the sum where it travels again."""
        return self.num_components if self.remix is None else len(self.remix.mix)

    @property
    def axes(self) -> Literal["ranks", "site", "blocks"]:
        """Whose they are: each rank's own, or one set for all ranks, over all features or within blocks of them."""
        if any(part.rank is not None for part in self.parts):
            return "ranks"
        return "site" if len(self.parts) == 1 else "blocks"

    def own(self, rank: int) -> slice:
        """The components that `rank` computes; all others are zero in what it puts in."""
        start = 0
        for part in self.parts:
            if part.rank == rank:
                return slice(start, start + len(part.analysis))
            start += len(part.analysis)
        return slice(0, start)

    def placed(self, z: Tensor, rank: int) -> Tensor:
        """The rank's own components at their place among all, [..., K]: the others are zero."""
        own = self.own(rank)
        return torch.nn.functional.pad(z, (own.start, self.num_components - own.stop))

    def fold(self, weight_EF: Tensor, rank: int) -> Tensor:
        """`weight_EF` [E, F] of a row-parallel layer, made to compute the rank's own components [K, F].

        InvalidInputError for weights that are not the numbers that are multiplied by, as quantized ones.
        """
        if weight_EF.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise InvalidInputError(
                "transform",
                expected="weights in floating point of 16 bits or more, into which its analysis is folded",
                found=str(weight_EF.dtype).removeprefix("torch."),
                remedy="Load the model without quantization, or calibrate with codec allocated.",
            )
        wide = weight_EF.float()
        rows = [
            part.analysis.to(wide) @ wide[part.start : part.stop]
            for part in self.parts
            if part.rank is None or part.rank == rank
        ]
        return torch.cat(rows).to(weight_EF.dtype)

    def analyze(self, x_TE: Tensor, rank: int) -> Tensor:
        """Components [T, K] in fp32 of a rank's partial sums, as if the weights had been folded."""
        own = [
            x_TE[:, part.start : part.stop].float() @ part.analysis.to(x_TE.device).float().T
            if part.rank is None or part.rank == rank
            else x_TE.new_zeros(len(x_TE), len(part.analysis), dtype=torch.float32)
            for part in self.parts
        ]
        return torch.cat(own, dim=1)

    def synthesize(self, z: Tensor, *, remixed: bool) -> Tensor:
        """Features [..., E] of summed components, or, `remixed`, of those in which the sum travelled again."""
        if remixed and self.remix is not None:
            return torch.nn.functional.linear(z, self.remix.synthesis.to(z.dtype))
        return torch.cat([torch.nn.functional.linear(z[..., k], synthesis) for k, synthesis in self._of(z.dtype)], -1)

    def _of(self, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        if dtype not in self._syntheses:
            self._syntheses[dtype] = [(k, synthesis.to(dtype)) for k, synthesis in self._blocks]
        return self._syntheses[dtype]

    @cached_property
    def _syntheses(self) -> dict[torch.dtype, list[tuple[slice, Tensor]]]:
        return {}

    @cached_property
    def _blocks(self) -> list[tuple[slice, Tensor]]:
        """By ascending features: the components they are made of, and the matrix that does it."""
        blocks: list[tuple[slice, Tensor]] = []
        start, features = 0, -1
        for part in self.parts:
            stop = start + len(part.analysis)
            if part.start == features:  # parts of several ranks make the same features
                k, synthesis = blocks.pop()
                blocks.append((slice(k.start, stop), torch.cat([synthesis, part.synthesis], dim=1)))
            else:
                blocks.append((slice(start, stop), part.synthesis))
            start, features = stop, part.start
        return blocks

    def to(self, device: torch.device) -> "Transform":
        """This transform with what every sum needs on `device`. Analyses stay where they are: they are folded once."""
        config, tensors = self.state()
        moved = {name: each if name.startswith("analysis") else each.to(device) for name, each in tensors.items()}
        return self.from_state(config, moved)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state from which `from_state` makes this transform again: JSON values, and tensors."""
        tensors: dict[str, Tensor] = {}
        for place, part in enumerate(self.parts):
            tensors |= {f"analysis{place}": part.analysis, f"synthesis{place}": part.synthesis}
        if self.remix is not None:
            tensors |= {"mix": self.remix.mix, "remixed": self.remix.synthesis}
        parts = [[part.start, part.rank] for part in self.parts]
        return {"num_features": self.num_features, "parts": parts}, tensors

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the transform that `state` describes; KeyError, TypeError or ValueError if it describes none."""
        parts = [
            Part(start=start, rank=rank, analysis=tensors[f"analysis{place}"], synthesis=tensors[f"synthesis{place}"])
            for place, (start, rank) in enumerate(config["parts"])
        ]
        remix = Remix(mix=tensors["mix"], synthesis=tensors["remixed"]) if "mix" in tensors else None
        made = cls(num_features=config["num_features"], parts=tuple(parts), remix=remix)
        made._check()
        return made

    def _check(self) -> None:
        shapes = all(part.analysis.shape == part.synthesis.T.shape for part in self.parts)
        remixed = self.remix is None or self.remix.mix.shape[1] == self.num_components
        if not self.parts or not shapes or not remixed or max(p.stop for p in self.parts) != self.num_features:
            raise InvalidInputError(
                "transform",
                expected=f"matrices between {self.num_features} features and their components",
                found=f"{[list(part.analysis.shape) for part in self.parts]}",
                remedy="Calibrate again.",
            )

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.state()[1].values())
