"""The base of codecs: a byte format with its parameters, checks of what it is given, and the way to its kernels."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from narrowcast.codecs import kernels
from narrowcast.errors import InvalidInputError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SATURATED, NON_FINITE, GUARDED = 0, 1, 2  # places in `stats`, int64 [3]


@dataclass(frozen=True, kw_only=True, eq=False)
class Codec(ABC):
    """The way of a tensor `[T, E]` (tokens, features) becomes bytes `uint8 [T, B]`, one row a token, and comes back.

    `id` names the byte format, not the class: see docs/formats.md. The bytes of a token depend on that token alone,
    unless not `by_token`: then in the last place on how many there are. `source` is the rank whose values are coded; a
    codec that codes the reduced sum has the one source 0.
    """

    id: ClassVar[str]
    by_token: ClassVar[bool] = True

    @property
    @abstractmethod
    def num_sources(self) -> int | None:
        """Ranks this codec is calibrated for; None if any rank's values may be coded."""

    @property
    @abstractmethod
    def granularity(self) -> int | None:
        """Number of features, from the first on, that share parameters and stay together; None for all of a token."""

    @property
    def calibrated_features(self) -> int | None:
        """Number of features that it is calibrated for; None if any will do."""
        return None

    @property
    def feeds_back(self) -> bool:
        """True if a source adds what its last payload lost to its next one: not where that has no place for it."""
        return True

    @property
    def nan_reach(self) -> int | None:
        """Number of features that a value which is not finite turns into NaN: 1 if the format has a code for it."""
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

    def encode(
        self,
        x_TE: Tensor,
        *,
        source: int,
        out: Tensor | None = None,
        stats: Tensor | None = None,
        residue: Tensor | None = None,
    ) -> Tensor:
        """Code `x_TE` (bf16, fp16 or fp32) into `out`, uint8 [T, B], made if not given.

        `residue`, fp32 [T, E], is added to the values in FP32, and becomes what the payload lost of that sum; 0 where
        that is not finite.
        `stats`, int64 [3] on the same device, counts at the places `SATURATED`, `NON_FINITE` and `GUARDED`: values
        that were clipped, values that were not finite, and tokens that a guard coded in another form, whose values do
        not count as clipped.
        """
        self._check_source(source)
        self._check_values(x_TE)
        if stats is not None:
            _check_stats(stats)
        num_tokens, num_features = x_TE.shape
        shape = num_tokens, self._known_row_nbytes(num_features)
        if out is None:
            out = torch.empty(shape, dtype=torch.uint8, device=x_TE.device)
        elif out.shape != shape or out.dtype is not torch.uint8:
            raise self._misfit(f"out of {list(shape)} bytes", out)
        if residue is not None:
            self._check_residue(residue, x_TE)
        if num_tokens and num_features:
            if residue is None:
                kernels.find(self, "encode", x_TE, out, stats)(self, x_TE, source, out, stats)
            else:
                run = kernels.find(self, "encode_with_residue", x_TE, out, stats)
                run(self, x_TE, residue, source, out, stats)
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
        return self._decode_into(payload_TB[None], source, out, dtype, num_features)

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
        return self._decode_into(payloads_RTB, 0, out, dtype, num_features)

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
        num_ranks, num_tokens, _ = payloads_RTB.shape
        shape = self.num_sources or num_ranks, num_tokens, self._known_row_nbytes(num_features)
        if payloads_RTB.shape != shape or payloads_RTB.dtype is not torch.uint8:
            raise self._misfit(f"payloads of {list(shape)} bytes", payloads_RTB)
        shape_out = num_tokens, reduced._known_row_nbytes(num_features)
        if out.shape != shape_out or out.dtype is not torch.uint8:
            raise reduced._misfit(f"out of {list(shape_out)} bytes", out)
        if stats is not None:
            _check_stats(stats)
        if num_tokens and num_features:
            run = kernels.find(self, "recode", payloads_RTB, out, stats)
            run(self, payloads_RTB, reduced, num_features, out, stats)
        return out

    def _decode_into(
        self,
        payloads_RTB: Tensor,
        first_source: int,
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
        if shape[0] and shape[1]:
            kernels.find(self, "decode_sum", payloads_RTB, out)(self, payloads_RTB, first_source, out)
        return out

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """Objects that kernels made of this codec, to use them again, by the type of the device."""
        return {}

    @abstractmethod
    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        """The reference of `encode`: fill `out_TB`, add to `stats`."""

    @abstractmethod
    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        """The reference of `decode_sum`: the payloads are those of the sources from `first_source` on."""

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

    def tokens(self, own: slice) -> "Codec":
        """The codec of some tokens of a tensor: this one, unless it stands in for one and keeps something of each."""
        return self

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
        """JSON values and tensors, of which `from_state` makes this codec again."""

    @classmethod
    @abstractmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the codec that `state` describes; ValueError, KeyError or TypeError if it describes none."""

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

    def _check_residue(self, residue: Tensor, x_TE: Tensor) -> None:
        """Kernels write to its rows by address."""
        fits = residue.shape == x_TE.shape and residue.dtype is torch.float32 and residue.device == x_TE.device
        if not fits or residue.stride(-1) != 1:
            raise InvalidInputError(
                "residue",
                expected=f"{list(x_TE.shape)} in fp32 on {x_TE.device}, rows contiguous",
                found=f"{list(residue.shape)} in {residue.dtype} on {residue.device}, strides {residue.stride()}",
                remedy="Begin with torch.zeros of that shape.",
            )

    def _misfit(self, expected: str, found: Tensor) -> InvalidInputError:
        return InvalidInputError(
            f"{self.id} codec",
            expected=expected,
            found=f"{list(found.shape)} in {found.dtype}",
            remedy="Size buffers with payload_nbytes.",
        )


def _check_stats(stats: Tensor) -> None:
    if stats.dtype is not torch.int64 or stats.shape != (3,):
        raise InvalidInputError(
            "stats", expected="int64 [3]", found=f"{list(stats.shape)} in {stats.dtype}", remedy="Pass zeros of that."
        )


def is_positive(scale: Tensor) -> bool:
    """True where all scales are finite, positive and normal numbers of BF16."""
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    return bool((scale.isfinite() & (scale >= smallest)).all())
