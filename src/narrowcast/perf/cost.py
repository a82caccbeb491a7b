"""The time that a sum takes, predicted from its size, the number of ranks, a link, and what coding costs here.

A model to choose hardware by and to see why something is slow; on ranks that run, `tune` measures instead. Coding runs
on one thread of a rank and overlaps with the link as far as chunks allow:

    latencies * (delay + software) + max(coding, wire) + min(coding, wire) / chunks

Wire is payload bytes over the rate that TCP leaves of it. Its errors against measurements: docs/benchmarks.md.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import Hops, named
from narrowcast.collectives.reduce import chunks_of
from narrowcast.launch import Link
from narrowcast.plan.decisions import Choice
from narrowcast.runtime.sites import plain
from narrowcast.transport import TcpTransport, TorchDistributedTransport

TCP_SHARE = 0.96  # of a link's bits that are payload: 1,448 of 1,500 bytes, and acknowledgements
LARGEST_NBYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Seconds a value on one thread: to encode it, and to decode it of one payload."""

    encode_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Software:
    """Seconds that a message takes beside its link, and what the library's own sum takes; bytes sent at a time."""

    chunk_nbytes: int | None
    message_s: float
    native_message_s: float
    native_value_s: float


# What small sums took beyond the delay on emulated links of 100 Mb/s to 10 Gb/s (benchmarks/results, bench collective;
# medians), Python and waking up included; and gloo's arithmetic.
SOFTWARE = {
    name: Software(
        chunk_nbytes=transport.chunk_nbytes, message_s=message_s, native_message_s=450e-6, native_value_s=2e-9
    )
    for name, transport, message_s in (("tcp", TcpTransport, 90e-6), ("torch", TorchDistributedTransport, 260e-6))
}


def measure_coding(codec: Codec, num_features: int, *, num_tokens: int = 64, seconds: float = 0.02) -> Coding:
    """The cost of coding BF16 values on one thread of this machine."""
    x_TE = torch.zeros(num_tokens, num_features, dtype=torch.bfloat16)
    payload_TB, y_TE = codec.encode(x_TE, source=0), torch.empty_like(x_TE)
    encode_s = _least_seconds(lambda: codec.encode(x_TE, source=0, out=payload_TB), seconds)
    decode_s = _least_seconds(lambda: codec.decode(payload_TB, source=0, out=y_TE), seconds)
    return Coding(encode_s=encode_s / x_TE.numel(), decode_s=decode_s / x_TE.numel())


def _least_seconds(call: Callable[[], object], seconds: float) -> float:
    least, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Sums of `num_features` BF16 values a token over `world_size` ranks that a link joins, each with its own."""

    hops: Hops
    num_features: int
    world_size: int
    link: Link
    transport: str
    coded: Coding
    plain: Coding

    def sum_s(self, choice: Choice, num_tokens: int) -> float | None:
        """Seconds of a sum of `num_tokens` tokens; None where the algorithm cannot run, or its work is unknown."""
        if choice.form == "native":
            return self._ring_s(num_tokens)
        hops = self.hops if choice.form == "coded" else plain(torch.bfloat16)
        coding = self.coded if choice.form == "coded" else self.plain
        algorithm = named(choice.algorithm)
        sent = algorithm.sent(hops, num_tokens, self.num_features, 0, self.world_size)
        work = algorithm.work(num_tokens * self.num_features, self.world_size)
        if sent is None or work is None:
            return None
        num_latencies, num_encoded, num_decoded = work
        coding_s = num_encoded * coding.encode_s + num_decoded * coding.decode_s
        wire_s = self._wire_s(sent.nbytes)
        chunk_nbytes = self._software.chunk_nbytes
        num_chunks = len(chunks_of(hops, num_tokens, self.num_features, self.world_size, chunk_nbytes))
        overlapped_s = max(coding_s, wire_s) + min(coding_s, wire_s) / num_chunks
        return num_latencies * (self.link.delay_s + self._software.message_s) + overlapped_s

    def _ring_s(self, num_tokens: int) -> float:
        num_values = num_tokens * self.num_features
        num_sent = 2 * (self.world_size - 1) / self.world_size * num_values
        num_steps = 2 * (self.world_size - 1)
        messages_s = num_steps * self.link.delay_s + self._software.native_message_s
        return messages_s + self._wire_s(2 * num_sent) + num_values * self._software.native_value_s

    def _wire_s(self, nbytes: float) -> float:
        return 8 * nbytes / (TCP_SHARE * self.link.rate_bps)

    def message_s(self, nbytes: int) -> float:
        """Seconds until what a rank sends once, `nbytes` in all, has arrived."""
        return self.link.delay_s + self._software.message_s + self._wire_s(nbytes)

    @property
    def _software(self) -> Software:
        return SOFTWARE[self.transport]

    def break_even_nbytes(self, choice: Choice) -> int | None:
        """Bytes of the smallest tensor whose sum is faster by `choice` than natively; None if none up to 1 GiB is."""
        num_tokens = 1
        while 2 * num_tokens * self.num_features <= LARGEST_NBYTES:
            seconds = self.sum_s(choice, num_tokens)
            if seconds is not None and seconds < self._ring_s(num_tokens):
                return 2 * num_tokens * self.num_features
            num_tokens = max(num_tokens + 1, num_tokens * 5 // 4)
        return None


def plain_coding(num_features: int) -> Coding:
    """The cost of values that travel as they are."""
    return measure_coding(CastCodec(dtype=torch.bfloat16), num_features)
