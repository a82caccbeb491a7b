"""Time beside bytes: where the seconds of a collective go, counted only where somebody asks for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

from narrowcast.codecs import Codec
from narrowcast.collectives.base import Hops
from narrowcast.transport import Buffers, Transport, Work

T = TypeVar("T")


PARTS = "encode", "decode", "recode", "exchange", "waiting"


class Span(NamedTuple):
    """A stretch of time of one of PARTS at a site, seconds of `time.perf_counter`, which ranks of a machine share."""

    site: str
    part: str
    start_s: float
    end_s: float


@dataclass
class Clock:
    """Seconds on the host by part: in codecs ("recode": decoding, adding up and encoding in one pass), in handing bytes
    to the transport, and in waiting for those of others. On a GPU these are the times of launches.

    `spans`: the stretches of time themselves, of `site`, if somebody wants them.
    """

    site: str = ""
    spans: list[Span] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def timed(self, call: Callable[..., T], part: str) -> Callable[..., T]:
        """`call`, whose seconds are added to `part`."""

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> T:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                end = time.perf_counter()
                self.seconds[part] += end - start
                if self.spans is not None:
                    self.spans.append(Span(self.site, part, start, end))

        return run

    def add(self, other: "Clock") -> None:
        """Count what another clock has counted."""
        for part, passed_s in other.seconds.items():
            self.seconds[part] += passed_s

    def hops(self, hops: Hops) -> Hops:
        """The same hops, with codecs that count their time here."""
        return replace(hops, codecs=tuple(self.codec(codec) for codec in hops.codecs))

    def codec(self, codec: Codec) -> Codec:
        """The same codec, counting its time here."""
        return cast(Codec, TimedCodec(codec, self))

    def transport(self, transport: Transport) -> Transport:
        """The same transport, counting its time here."""
        return cast(Transport, TimedTransport(transport, self))

    def to_json(self) -> dict[str, float]:
        """Seconds by part."""
        return {f"{part}_s": seconds for part, seconds in self.seconds.items()}


class TimedCodec:
    """Stands in for `codec` in the steps of an algorithm, and counts its time."""

    def __init__(self, codec: Codec, clock: Clock) -> None:
        self._codec, self._clock = codec, clock
        self.encode = clock.timed(codec.encode, "encode")
        self.decode = clock.timed(codec.decode, "decode")
        self.decode_sum = clock.timed(codec.decode_sum, "decode")

    def recode(self, payloads_RTB: Any, reduced: "TimedCodec", **kwargs: Any) -> Any:
        """The codec's `recode`, by the codec that `reduced` stands in for."""
        return self._clock.timed(self._codec.recode, "recode")(payloads_RTB, reduced._codec, **kwargs)

    def tokens(self, own: slice) -> "TimedCodec":
        """A stand-in for the codec of some tokens."""
        return TimedCodec(self._codec.tokens(own), self._clock)

    def features(self, start: int, stop: int) -> "TimedCodec":
        """A stand-in for the codec of a block of features."""
        return TimedCodec(self._codec.features(start, stop), self._clock)

    def part(self, start: int, stop: int) -> "TimedCodec":
        """A stand-in for the codec of a rank's features."""
        return TimedCodec(self._codec.part(start, stop), self._clock)

    def sources(self, ranks: tuple[int, ...]) -> "TimedCodec":
        """A stand-in for the codec of some sources."""
        return TimedCodec(self._codec.sources(ranks), self._clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)


class TimedTransport:
    """Stands in for `transport`, and counts the time of starting exchanges and of waiting for them."""

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport, self._clock = transport, clock

    def exchange(self, sends: Buffers, recvs: Buffers, *, tag: int) -> Work:
        """The transport's exchange."""
        start = self._clock.timed(self._transport.exchange, "exchange")
        return TimedWork(start(sends, recvs, tag=tag), self._clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@dataclass(frozen=True)
class TimedWork:
    """Bytes on their way, for which waiting is counted."""

    work: Work
    clock: Clock

    def wait(self) -> None:
        """Return when all have arrived; raises as the transport's own."""
        self.clock.timed(self.work.wait, "waiting")()
