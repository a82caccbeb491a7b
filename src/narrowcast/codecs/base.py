"""What every codec is: a byte format with its parameters, and the ranges it may be calibrated from."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from narrowcast.codecs.kernels import cpu
from narrowcast.errors import InvalidInputError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Codec(ABC):
    """How a tensor `[T, E]` (tokens, features) becomes bytes `uint8 [T, B]`, one row a token, and comes back.

    `id` names the byte format, not the class: see docs/formats.md. The bytes of a token depend on that token
    alone. `source` is the rank whose values are coded; a codec that codes the reduced sum has the one source 0.
    """

    id: ClassVar[str]

    @property
    @abstractmethod
    def num_sources(self) -> int | None:
        """Ranks this codec is calibrated for; None if any rank's values may be coded."""

    @property
    @abstractmethod
    def granularity(self) -> int | None:
        """How many features, counted from the first, share parameters and stay together; None for all of a token."""

    @property
    def nan_reach(self) -> int | None:
        """How many features a value that is not finite turns into NaN: 1 if the format has a code for it."""
        return 1

    @abstractmethod
    def row_nbytes(self, num_features: int) -> int:
        """Payload bytes of one token."""

    def _known_row_nbytes(self, num_features: int) -> int:
        nbytes = self._sizes.get(num_features)
        if nbytes is None:
            nbytes = self._sizes[num_features] = self.row_nbytes(num_features)
        return nbytes

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {}

    def payload_nbytes(self, num_tokens: int, num_features: int) -> int:
        """Payload bytes of `num_tokens` tokens."""
        return num_tokens * self.row_nbytes(num_features)

    def encode(self, x_TE: Tensor, *, source: int, out: Tensor | None = None, stats: Tensor | None = None) -> Tensor:
        """Code `x_TE` (bf16, fp16 or fp32) into `out`, uint8 [T, B], made if not given.

        `stats`, int64 [3] on the same device, counts values that were clipped, values that were not finite, and
        tokens that a guard coded in another form, whose values do not count as clipped (places in `ops`).
        """
        self._check_source(source)
        self._check_values(x_TE)
        shape = x_TE.shape[0], self._known_row_nbytes(x_TE.shape[1])
        if out is None:
            out = torch.empty(shape, dtype=torch.uint8, device=x_TE.device)
        elif out.shape != shape or out.dtype is not torch.uint8:
            raise self._misfit(f"out of {list(shape)} bytes", out)
        if not x_TE.numel():
            return out
        kernel = self._kernel
        if kernel is not None and cpu.enabled and _is_plain(x_TE) and _is_plain(out) and _may_count(stats):
            kernel.encode(x_TE, source, out, stats)
        else:
            self._encode(x_TE, source, out, stats)
        return out

    def decode(
        self,
        payload_TB: Tensor,
        *,
        source: int,
        out: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        num_features: int | None = None,
    ) -> Tensor:
        """Values [T, E] of the payload of rank `source`, in `out` or as `dtype`.

        `num_features` is E, needed without `out` where several E take as many bytes (`self.num_features`).
        """
        self._check_source(source)
        return self._decode_into(payload_TB[None], source, 1, out, dtype, num_features)

    def decode_sum(
        self,
        payloads_RTB: Tensor,
        *,
        out: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        num_features: int | None = None,
    ) -> Tensor:
        """Sum [T, E] over the payloads of all ranks: fp32, in rank order, rounded once to `out` or `dtype`.

        `num_features` as in `decode`.
        """
        num_ranks = len(payloads_RTB)
        if self.num_sources not in (None, num_ranks):
            raise InvalidInputError(
                f"{self.id} codec",
                expected=f"payloads of {self.num_sources} ranks",
                found=f"{num_ranks}",
                remedy="Use a codec that was calibrated for this many ranks.",
            )
        return self._decode_into(payloads_RTB, 0, num_ranks, out, dtype, num_features)

    def recode(
        self,
        payloads_RTB: Tensor,
        reduced: "Codec",
        *,
        num_features: int,
        out: Tensor,
        stats: Tensor | None = None,
    ) -> Tensor:
        """The payload of the sum, coded by `reduced`: `decode_sum` in FP32, then `encode`, in one pass if possible."""
        kernel, second = self._kernel, reduced._kernel
        plain = _is_plain(payloads_RTB) and _is_plain(out) and _may_count(stats)
        if kernel is None or second is None or not cpu.enabled or not plain:
            total_TE = self.decode_sum(payloads_RTB, num_features=num_features)
            return reduced.encode(total_TE, source=0, out=out, stats=stats)
        num_ranks, num_tokens, _ = payloads_RTB.shape
        shape = self.num_sources or num_ranks, num_tokens, self._known_row_nbytes(num_features)
        if payloads_RTB.shape != shape or payloads_RTB.dtype is not torch.uint8:
            raise self._misfit(f"payloads of {list(shape)} bytes", payloads_RTB)
        shape_out = num_tokens, reduced._known_row_nbytes(num_features)
        if out.shape != shape_out or out.dtype is not torch.uint8:
            raise reduced._misfit(f"out of {list(shape_out)} bytes", out)
        if out.numel():
            kernel.recode(payloads_RTB, second, num_features, out, stats)
        return out

    def _decode_into(
        self,
        payloads_RTB: Tensor,
        first_source: int,
        num_sources: int,
        out: Tensor | None,
        dtype: torch.dtype,
        num_features: int | None,
    ) -> Tensor:
        _, num_tokens, row_nbytes = payloads_RTB.shape
        if out is None:
            num_features = self.num_features(row_nbytes) if num_features is None else num_features
            out = torch.empty(num_tokens, num_features, dtype=dtype, device=payloads_RTB.device)
        shape = num_tokens, out.shape[-1] if num_features is None else num_features
        known_nbytes = self._known_row_nbytes(shape[1])
        if out.shape != shape or known_nbytes != row_nbytes or payloads_RTB.dtype is not torch.uint8:
            raise InvalidInputError(
                f"{self.id} codec",
                expected=f"{list(shape)} values, {known_nbytes} bytes a token",
                found=f"{row_nbytes} a token in {payloads_RTB.dtype}, to be decoded into {list(out.shape)}",
                remedy="Decode what was encoded, with its number of features.",
            )
        self._check_values(out)
        if not out.numel():
            return out
        kernel = self._kernel
        if kernel is not None and cpu.enabled and _is_plain(payloads_RTB) and _is_plain(out):
            kernel.decode_sum(payloads_RTB, first_source, out)
        else:
            self._decode_sum(payloads_RTB, slice(first_source, first_source + num_sources), out)
        return out

    @cached_property
    def _kernel(self) -> cpu.Kernel | None:
        return self._make_kernel()

    def _make_kernel(self) -> cpu.Kernel | None:
        """This codec's kernels for CPU tensors; None where there are none but its operators."""
        return None

    @abstractmethod
    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None: ...

    @abstractmethod
    def _decode_sum(self, payloads_RTB: Tensor, sources: slice, out_TE: Tensor) -> None: ...

    def num_features(self, row_nbytes: int) -> int:
        """Features E of a payload whose rows have `row_nbytes`; InvalidInputError if no E or several fit."""
        reach = range(8 * row_nbytes + 1)  # no codec takes less than a bit a feature
        first = bisect_left(reach, row_nbytes, key=self.row_nbytes)
        fits = [each for each in (first, first + 1) if self.row_nbytes(each) == row_nbytes]
        if len(fits) != 1:
            raise InvalidInputError(
                f"{self.id} codec",
                expected="num_features=E, the number of features that were encoded",
                found=f"rows of {row_nbytes} bytes, as {'several' if fits else 'no'} numbers of features take",
                remedy="Pass num_features, or out.",
            )
        return fits[0]

    def features(self, start: int, stop: int) -> "Codec":
        """The codec of the features `start` to `stop` alone: their values decode as they would among all.

        Unless a guard codes the token in another form: it looks at a block by itself.
        `start` is a multiple of `granularity`, and so is `stop` unless it is E.
        """
        assert start == 0 or (self.granularity is not None and start % self.granularity == 0)
        if (start, stop) not in self._blocks:
            self._blocks[start, stop] = self._features(start, stop)
        return self._blocks[start, stop]

    def part(self, start: int, stop: int) -> "Codec":
        """The codec of a rank that holds the features `start` to `stop`, and codes them as a tensor of their own."""
        return self if self.num_sources is None else self.features(start, stop)

    @cached_property
    def _blocks(self) -> dict[tuple[int, int], "Codec"]:
        return {}

    @abstractmethod
    def _features(self, start: int, stop: int) -> "Codec": ...

    def sources(self, ranks: tuple[int, ...]) -> "Codec":
        """The codec of the sources `ranks` alone, in that order: `decode_sum` of it takes their payloads."""
        if self.num_sources is None or ranks == tuple(range(self.num_sources)):
            return self
        if ranks not in self._choices:
            self._choices[ranks] = self._sources(ranks)
        return self._choices[ranks]

    @cached_property
    def _choices(self) -> dict[tuple[int, ...], "Codec"]:
        return {}

    def _sources(self, ranks: tuple[int, ...]) -> "Codec":
        raise NotImplementedError("a codec with calibrated sources overrides this")

    @abstractmethod
    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        """Largest error [T, E] that finite `x_TE` can suffer from coding."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `from_state` needs to make this codec again: JSON values, and tensors."""

    @classmethod
    @abstractmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the codec that `state` describes; ValueError, KeyError or TypeError if it describes none."""

    def to(self, device: torch.device) -> "Codec":
        """This codec with its tensors on `device`."""
        config, tensors = self.state()
        return self.from_state(config, {name: tensor.to(device) for name, tensor in tensors.items()})

    def _check_source(self, source: int) -> None:
        num_sources = self.num_sources
        if num_sources is not None and not 0 <= source < num_sources:
            raise InvalidInputError(
                f"{self.id} codec",
                expected=f"a source rank from 0 to {num_sources - 1}",
                found=source,
                remedy="Use a codec that was calibrated for this many ranks.",
            )

    def _check_values(self, x_TE: Tensor) -> None:
        if x_TE.dtype not in FLOAT_DTYPES or x_TE.dim() != 2:
            raise InvalidInputError(
                f"{self.id} codec",
                expected="values [tokens, features] in bf16, fp16 or fp32",
                found=f"{list(x_TE.shape)} in {x_TE.dtype}",
                remedy="Reshape or convert them first.",
            )

    def _misfit(self, expected: str, found: Tensor) -> InvalidInputError:
        return InvalidInputError(
            f"{self.id} codec",
            expected=expected,
            found=f"{list(found.shape)} in {found.dtype}",
            remedy="Size buffers with payload_nbytes.",
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether its address tells all: a CPU tensor that is no stand-in for one, its last dimension contiguous."""
    return type(tensor) is Tensor and tensor.is_cpu and tensor.stride(-1) == 1


def is_positive(scale: Tensor) -> bool:
    """Whether all scales are finite, positive and normal numbers of BF16."""
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    return bool((scale.isfinite() & (scale >= smallest)).all())


def _may_count(stats: Tensor | None) -> bool:
    return stats is None or (_is_plain(stats) and stats.dtype is torch.int64 and stats.shape == (3,))


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicCodec(Codec):
    """A codec without calibrated tensors: any rank's values may be coded, and it is its own recipe."""

    @property
    def num_sources(self) -> None:
        return None

    def codec(self, ranges: "Ranges") -> Self:
        """Itself: what it needs to know of the values it finds in each token."""
        return self

    def _features(self, start: int, stop: int) -> Self:
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}, {}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(**config)


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Smallest and largest value of each feature over tokens, per source: fp32 tensors [R, E].

    `scale_low` and `scale_high` are for scales, `low` and `high` for the choice of outliers: they differ where
    the first tokens of a sequence do not count for scales.
    """

    low: Tensor
    high: Tensor
    scale_low: Tensor
    scale_high: Tensor

    @classmethod
    def of(cls, x_RTE: Tensor) -> Self:
        """The ranges of all tokens of `x_RTE`."""
        low, high = x_RTE.float().amin(dim=1), x_RTE.float().amax(dim=1)
        return cls(low=low, high=high, scale_low=low, scale_high=high)

    @property
    def width(self) -> Tensor:
        """Twice the largest magnitude [R, E]: the range of a symmetric code."""
        return 2 * torch.maximum(self.low.abs(), self.high.abs())

    @property
    def scale_largest(self) -> Tensor:
        """Largest magnitude [R, E] that a scale must reach."""
        return torch.maximum(self.scale_low.abs(), self.scale_high.abs())


class Recipe(Protocol):
    """What a preset holds: how to make a codec from the ranges seen in calibration."""

    def codec(self, ranges: Ranges) -> Codec:
        """The codec for values in these ranges."""
        ...
