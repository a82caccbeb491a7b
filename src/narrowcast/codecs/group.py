"""`group`: small integers with parameters for each group of features, found anew in every token.

The formats of the shipped peers: QuickReduce (symmetric, groups of 32), Flash Communication (arXiv 2412.04964;
asymmetric, groups of 128) and its second version (arXiv 2508.03760), which keeps each group's two extremes as they
are. Their FP16 parameters overflow beyond 65504 and fade below 2e-3; here parameters are BF16.

Shapes: G groups of S features; the last one may be short.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from narrowcast.codecs import arithmetic, packing, spelling
from narrowcast.codecs.base import NON_FINITE, SATURATED
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.errors import InvalidInputError

SMALLEST_STEP = torch.finfo(torch.bfloat16).smallest_normal  # so that its reciprocal is finite


class _Fit(NamedTuple):
    """The parameters of each group, BF16 [T, G], NaN where one of its values is not finite.

    A code c stands for `zero + (c - offset) * step`. `spikes`: the smallest and the largest value, [2, T, G], at
    `places`; both are empty, [0, T, G], where none are kept.
    """

    step: Tensor
    zero: Tensor
    spikes: Tensor
    places: Tensor


def group_encode(
    x_TE: Tensor, num_bits: int, group_size: int, symmetric: bool, spikes: bool, out_TB: Tensor, stats: Tensor | None
) -> None:
    """Fit each group's parameters, then code its values with the parameters as they will be read."""
    num_features = x_TE.shape[1]
    x_TGS = _grouped(x_TE, group_size)
    fit = _fit(x_TGS, num_features, num_bits, symmetric, spikes)
    step_TG1, zero_TG1 = fit.step.float()[:, :, None], fit.zero.float()[:, :, None]
    offset = _offset(num_bits, symmetric)
    steps_TGS = (x_TGS - zero_TG1).mul_(1.0 / step_TG1).round_()
    steps_TGS.masked_fill_(step_TG1.isnan(), 0)
    for place_TG in fit.places:
        steps_TGS.scatter_(2, place_TG[:, :, None], 0.0)
    steps_TE = steps_TGS.flatten(1)[:, :num_features]
    codes_TE = steps_TE.clamp(-offset, 2**num_bits - 1 - offset)
    if stats is not None:
        stats[SATURATED] += (codes_TE != steps_TE).count_nonzero()
        stats[NON_FINITE] += arithmetic.not_finite(x_TE).count_nonzero()
    parameters = [fit.step] if symmetric else [fit.step, fit.zero]
    parts = [each.view(torch.uint8) for each in (*parameters, *fit.spikes)]
    parts += [place.to(torch.uint8) for place in fit.places]
    torch.cat([*parts, packing.pack(codes_TE.add_(offset).to(torch.uint8), num_bits)], dim=1, out=out_TB)


def group_decode_sum(
    payloads_RTB: Tensor, num_bits: int, group_size: int, symmetric: bool, spikes: bool, out_TE: Tensor
) -> None:
    """Decode each rank's payload and sum in fp32, in rank order."""
    num_features = out_TE.shape[1]
    num_groups = -(-num_features // group_size)
    decoded = []
    for payload_TB in payloads_RTB:
        take = _reader(payload_TB)
        step_TG = arithmetic.values(take(2 * num_groups), torch.bfloat16)
        zero_TG = None if symmetric else arithmetic.values(take(2 * num_groups), torch.bfloat16)
        spikes_TG = [arithmetic.values(take(2 * num_groups), torch.bfloat16) for _ in range(2 * spikes)]
        places_TG = [take(num_groups).long() & group_size - 1 for _ in range(2 * spikes)]
        codes_TE = packing.unpack(take(None), num_bits, num_features)
        values_TGS = _grouped(codes_TE, group_size).sub_(_offset(num_bits, symmetric)).mul_(step_TG[:, :, None])
        if zero_TG is not None:
            values_TGS.add_(zero_TG[:, :, None])
        for spike_TG, place_TG in zip(spikes_TG, places_TG, strict=True):
            values_TGS.scatter_(2, place_TG[:, :, None], spike_TG[:, :, None])
        decoded.append(values_TGS.flatten(1)[:, :num_features])
    arithmetic.store_sum(decoded, out_TE)


def group_error_bound(x_TE: Tensor, num_bits: int, group_size: int, symmetric: bool, spikes: bool) -> Tensor:
    """Largest error [T, E] that finite `x_TE` can suffer."""
    # Half a step; where the codes of the one sign end a step early, what lies beyond; and half a dozen fp32
    # roundings (2**-24 each) of numbers no larger than the group's reach.
    x_TGS = _grouped(x_TE, group_size)
    fit = _fit(x_TGS, x_TE.shape[1], num_bits, symmetric, spikes)
    step_TG1, zero_TG1 = fit.step.float()[:, :, None], fit.zero.float()[:, :, None]
    reach_TG1 = step_TG1.abs() * 2**num_bits + zero_TG1.abs()
    bound_TGS = (step_TG1.abs() / 2).expand_as(x_TGS)
    if symmetric:
        beyond_TGS = x_TGS * step_TG1.sign() - step_TG1.abs() * (2 ** (num_bits - 1) - 1)
        bound_TGS = torch.maximum(bound_TGS, beyond_TGS)
    bound_TGS = bound_TGS + reach_TG1 * 2**-21
    for place_TG, spike_TG in zip(fit.places, fit.spikes, strict=True):
        rounding_TG = spike_TG.float().abs().mul(2**-8).clamp(min=2**-134)
        bound_TGS.scatter_(2, place_TG[:, :, None], rounding_TG[:, :, None])
    bound_TE: Tensor = bound_TGS.flatten(1)[:, : x_TE.shape[1]]
    return bound_TE


def _reader(payload_TB: Tensor) -> Callable[[int | None], Tensor]:
    """A function that gives the next columns of a payload; None for all that are left."""
    start = 0

    def take(nbytes: int | None) -> Tensor:
        nonlocal start
        part_TB = payload_TB[:, start : None if nbytes is None else start + nbytes]
        start += part_TB.shape[1]
        return part_TB

    return take


def _offset(num_bits: int, symmetric: bool) -> int:
    """The code of zero."""
    return 2 ** (num_bits - 1) if symmetric else 0


def _grouped(x_TE: Tensor, group_size: int) -> Tensor:
    """[T, G, S] in fp32, the last value repeated up to the end of the last group."""
    num_tokens, num_features = x_TE.shape
    missing = -num_features % group_size
    x_TE = pad(x_TE.float()[:, None], (0, missing), mode="replicate")[:, 0] if missing else x_TE.float()
    return x_TE.reshape(num_tokens, (num_features + missing) // group_size, group_size)


def _fit(x_TGS: Tensor, num_features: int, num_bits: int, symmetric: bool, spikes: bool) -> _Fit:
    spikes_TG, places_TG, low_TG, high_TG = _extremes(x_TGS, num_features, spikes)
    if symmetric:
        # The value that lies farthest from zero takes the lowest code, which has no opposite; its sign is the step's.
        far_TG = torch.where(high_TG > -low_TG, high_TG, low_TG)
        span_TG, num_steps = far_TG.abs(), 2 ** (num_bits - 1)
        sign_TG = torch.where(far_TG > 0, -1.0, 1.0)
        zero_TG = torch.zeros_like(far_TG, dtype=torch.bfloat16)
    else:
        zero_TG = arithmetic.bfloat16_down(low_TG + 0.0)  # no -0.0, which would depend on the order of a reduction
        span_TG, num_steps = high_TG - zero_TG.float(), 2**num_bits - 1
        sign_TG = torch.ones_like(span_TG)
    step_TG = arithmetic.bfloat16_up((span_TG / num_steps).clamp_(min=SMALLEST_STEP))
    bad_TG = arithmetic.not_finite(span_TG) | arithmetic.not_finite(zero_TG.float() + step_TG.float() * num_steps)
    for spike_TG in spikes_TG:
        bad_TG |= arithmetic.not_finite(spike_TG)
    step_TG = (step_TG * sign_TG.bfloat16()).masked_fill_(bad_TG, torch.nan)
    return _Fit(step_TG, zero_TG.masked_fill_(bad_TG, torch.nan), spikes_TG.masked_fill_(bad_TG, torch.nan), places_TG)


def _extremes(x_TGS: Tensor, num_features: int, spikes: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes [2, T, G] in BF16 and their places, if kept; smallest and largest [T, G] of the values left."""
    if not spikes:
        none = x_TGS.new_empty(0, *x_TGS.shape[:2])
        return none.bfloat16(), none.long(), x_TGS.amin(dim=2), x_TGS.amax(dim=2)
    places_TG = torch.stack([x_TGS.argmin(dim=2), x_TGS.argmax(dim=2)])  # of equals the first
    spikes_TG = torch.stack([x_TGS.gather(2, place_TG[:, :, None])[:, :, 0] for place_TG in places_TG])
    _, num_groups, group_size = x_TGS.shape
    real_GS = torch.arange(num_groups * group_size, device=x_TGS.device).view(num_groups, group_size) < num_features
    left_TGS = real_GS.repeat(len(x_TGS), 1, 1)
    for place_TG in places_TG:
        left_TGS.scatter_(2, place_TG[:, :, None], False)
    low_TG = x_TGS.masked_fill(~left_TGS, torch.inf).amin(dim=2)
    high_TG = x_TGS.masked_fill(~left_TGS, -torch.inf).amax(dim=2)
    nothing_TG = ~left_TGS.any(dim=2)  # a group of one or two values
    return spikes_TG.bfloat16(), places_TG, low_TG.masked_fill_(nothing_TG, 0), high_TG.masked_fill_(nothing_TG, 0)


@dataclass(frozen=True, kw_only=True)
class GroupCodec(DynamicCodec):
    """Integers of `num_bits` (2 to 8) with BF16 parameters for every `group_size` (32, 64, 128) features.

    `symmetric`: the arithmetic of QuickReduce; otherwise a minimum and a step, as Flash Communication has it, and
    with `spikes` each group's smallest and largest value in BF16, the rest coded in the range that is left.
    A value that is not finite turns its group into NaN.

    >>> codec = GroupCodec(num_bits=2, group_size=32)
    >>> payload = codec.encode(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.5]]), source=0)
    >>> payload.tolist()  # step 1.5, minimum 1.0, five codes
    [[192, 63, 128, 63, 52, 9]]
    >>> codec.decode(payload, source=0, num_features=5)
    tensor([[1.0000, 2.5000, 2.5000, 4.0000, 5.5000]])
    """

    id: ClassVar[str] = "group"
    num_bits: int = field(metadata=spelling.key("bits"))
    group_size: int = field(metadata=spelling.key("size"))
    symmetric: bool = False
    spikes: bool = False

    def __post_init__(self) -> None:
        known = self.num_bits in range(2, 9) and self.group_size in (32, 64, 128)
        if not known or (self.symmetric and self.spikes):
            raise InvalidInputError(
                "group codec",
                expected="2 to 8 bits, groups of 32, 64 or 128, spikes only if asymmetric",
                found=self,
                remedy="Choose other parameters.",
            )

    @property
    def granularity(self) -> int:
        return self.group_size

    @property
    def nan_reach(self) -> int:
        return self.group_size

    def row_nbytes(self, num_features: int) -> int:
        num_groups = -(-num_features // self.group_size)
        per_group = 2 if self.symmetric else 4 + 6 * self.spikes
        return per_group * num_groups + packing.packed_nbytes(num_features, self.num_bits)

    def _encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        group_encode(x_TE, *self._arguments, out_TB, stats)

    def _decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        group_decode_sum(payloads_RTB, *self._arguments, out_TE)

    @property
    def _arguments(self) -> tuple[int, int, bool, bool]:
        return self.num_bits, self.group_size, self.symmetric, self.spikes

    def error_bound(self, x_TE: Tensor, *, source: int) -> Tensor:
        return group_error_bound(x_TE, *self._arguments)
