"""Floating-point formats of 4, 6 and 8 bits: what their codes stand for, and rounding to them."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A sign, `exponent_bits`, `mantissa_bits`; subnormals where the exponent's bits are 0, as in IEEE 754.

    `largest_code` is that of the largest finite magnitude; what lies above is NaN (or would be infinity).
    """

    exponent_bits: int
    mantissa_bits: int
    largest_code: int

    @property
    def num_bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign(self) -> int:
        """The sign's bit."""
        return 1 << self.num_bits - 1

    @property
    def nan_code(self) -> int | None:
        """All bits set but the sign, where that is no number."""
        return self.sign - 1 if self.largest_code < self.sign - 1 else None

    @property
    def smallest_exponent(self) -> int:
        """Of the normal numbers: 1 - bias, where the bias is 2**(exponent_bits - 1) - 1."""
        return 2 - (1 << self.exponent_bits - 1)

    @property
    def largest(self) -> float:
        return self._magnitude(self.largest_code)

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)): emax of the OCP specification."""
        return (self.largest_code >> self.mantissa_bits) - 1 + self.smallest_exponent

    def _magnitude(self, code: int) -> float:
        field, mantissa = code >> self.mantissa_bits, code & (1 << self.mantissa_bits) - 1
        implicit = (field > 0) << self.mantissa_bits
        exponent = max(field, 1) - 1 + self.smallest_exponent
        return math.ldexp(implicit + mantissa, exponent - self.mantissa_bits)

    def values(self, device: torch.device) -> Tensor:
        """Values that codes stand for, fp32 [2**num_bits]; NaN for infinities too, which nothing encodes to."""
        return _values(self, device)

    def quantum(self, magnitude: Tensor) -> Tensor:
        """The distance of this format's numbers around fp32 `magnitude`, which is not negative."""
        return (self._exponent_field(magnitude) - self.mantissa_bits << 23).view(torch.float32)

    def round(self, x: Tensor) -> Tensor:
        """Codes int32 of finite fp32 `x`, half to even, without the sign and not yet limited to `largest_code`.

        In the units of its binade, a magnitude becomes an integer; rounding up to the next binade needs no care,
        as codes go on from one binade to the next.
        """
        magnitude = x.abs()
        field = self._exponent_field(magnitude)
        units = magnitude.mul_((254 + self.mantissa_bits - field << 23).view(torch.float32)).round_()
        return units.to(torch.int32).add_(field.sub_(127 + self.smallest_exponent) << self.mantissa_bits)

    def _exponent_field(self, magnitude: Tensor) -> Tensor:
        return (magnitude.view(torch.int32) >> 23).clamp_(min=127 + self.smallest_exponent)


@cache
def _values(form: FloatFormat, device: torch.device) -> Tensor:
    positive = [form._magnitude(code) if code <= form.largest_code else torch.nan for code in range(form.sign)]
    return torch.tensor([*positive, *(-value for value in positive)], device=device)


E4M3 = FloatFormat(4, 3, 0x7E)  # float8_e4m3fn: 448, no infinity
E5M2 = FloatFormat(5, 2, 0x7B)  # 57344
E2M3 = FloatFormat(2, 3, 0x1F)  # 7.5, no NaN either
E3M2 = FloatFormat(3, 2, 0x1F)  # 28
E2M1 = FloatFormat(2, 1, 0x07)  # 6
FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "e2m3": E2M3, "e3m2": E3M2, "e2m1": E2M1}
