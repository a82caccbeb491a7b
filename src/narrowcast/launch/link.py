"""A link between ranks: how many bits a second it carries, and how long each takes to arrive."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from narrowcast.errors import InvalidInputError

RATES = {"": Decimal(1), "K": Decimal(10) ** 3, "M": Decimal(10) ** 6, "G": Decimal(10) ** 9, "T": Decimal(10) ** 12}
DELAYS = {"ns": Decimal(10) ** -9, "us": Decimal(10) ** -6, "ms": Decimal(10) ** -3, "s": Decimal(1)}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)([kKMGT]?)(?:bps|b/s),(\d+(?:\.\d+)?)(ns|us|µs|ms|s)", re.ASCII)


@dataclass(frozen=True)
class Link:
    """`rate_bps` bits a second in each direction, of which each arrives `delay_s` seconds after it was sent.

    >>> link = Link.parse("1Gbps,0.1ms")
    >>> str(link), round(link.transfer_s(4 * 2**20), 6)
    ('1Gbps,100us', 0.033654)
    """

    rate_bps: float
    delay_s: float

    def __post_init__(self) -> None:
        if not (0 < self.rate_bps < float("inf") and 0 <= self.delay_s < float("inf")):
            raise _refused(f"{self.rate_bps} bits a second, {self.delay_s} s")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The link of a text such as "100Mbps,1ms" or "10Gb/s,50us"; InvalidInputError for others."""
        found = _TEXT.fullmatch(text.replace(" ", ""))
        if found is None:
            raise _refused(repr(text))
        rate, prefix, delay, unit = found.groups()
        try:
            return cls(float(Decimal(rate) * RATES[prefix.upper()]), float(Decimal(delay) * DELAYS[_ascii(unit)]))
        except InvalidInputError as error:
            raise _refused(repr(text)) from error

    def __str__(self) -> str:
        rate, delay = _written(self.rate_bps, RATES), _written(self.delay_s, DELAYS)
        return f"{rate}bps,{delay}"

    def transfer_s(self, nbytes: int) -> float:
        """Seconds from the first of `nbytes` being sent to the last one's arrival: no message takes less."""
        return self.delay_s + nbytes * 8 / self.rate_bps


def _ascii(unit: str) -> str:
    return unit.replace("µ", "u")


def _written(value: float, units: dict[str, Decimal]) -> str:
    """`value`, exactly, in the largest unit of which it is one or more."""
    exact = Decimal(repr(value))
    fitting = [name for name, size in units.items() if exact >= size]
    unit = fitting[-1] if fitting else next(iter(units))
    return f"{(exact / units[unit]).normalize():f}{unit}"


def _refused(found: str) -> InvalidInputError:
    return InvalidInputError(
        "link",
        expected="RATE,DELAY with a rate above nothing",
        found=found,
        remedy="Write it as 1Gbps,0.1ms or 100Mb/s,1ms.",
    )
