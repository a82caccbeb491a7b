"""The time that a sum takes, predicted from its size, the number of ranks, a link, and what coding costs here.

A model to choose hardware by and to see why something is slow; on ranks that run, `tune` measures instead. Coding runs
on one thread of a rank and overlaps with the link as far as chunks allow:

    latencies * (delay + software) + max(coding, wire) + min(coding, wire) / chunks

Wire is payload bytes over the rate that TCP leaves of it. Its errors against measurements: docs/benchmarks.md.
"""

from dataclasses import dataclass

import torch

from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import Hops, named
from narrowcast.collectives.reduce import chunks_of
from narrowcast.launch import Link
from narrowcast.perf.timing import Case, interleaved, rounds_within, seconds
from narrowcast.plan.decisions import Choice
from narrowcast.runtime.sites import plain
from narrowcast.transport import TcpTransport, TorchDistributedTransport

TCP_SHARE = 0.96  # of a link's bits that are payload: 1,448 of 1,500 bytes, and acknowledgements
LARGEST_NBYTES = 1 << 30
NUM_TOKENS, SECONDS = 64, 0.04  # of measuring what coding costs

# What small sums took beyond the delay on emulated links of 100 Mb/s to 10 Gb/s (benchmarks/results, bench collective;
# medians), Python and waking up included; and gloo's arithmetic.
MESSAGE_S = {"tcp": 90e-6, "torch": 260e-6}
NATIVE_MESSAGES_S, NATIVE_VALUE_S = 450e-6, 2e-9
CHUNK_VALUES = {"tcp": TcpTransport.chunk_values, "torch": TorchDistributedTransport.chunk_values}


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Seconds a value on one thread: to encode it, and to decode it of one payload."""

    encode_s: float
    decode_s: float


def measure_coding(codec: Codec, num_features: int) -> Coding:
    """The cost of coding BF16 values on one thread of this machine: of the fastest run."""
    x_TE = torch.zeros(NUM_TOKENS, num_features, dtype=torch.bfloat16)
    payload_TB, y_TE = codec.encode(x_TE, source=0), torch.empty_like(x_TE)
    cases = {
        "encode_s": Case(lambda: codec.encode(x_TE, source=0, out=payload_TB)),
        "decode_s": Case(lambda: codec.decode(payload_TB, source=0, out=y_TE)),
    }
    spans = interleaved(cases, rounds_within(SECONDS, cases))
    return Coding(**{name: min(seconds(each)) / x_TE.numel() for name, each in spans.items()})


def plain_coding(num_features: int) -> Coding:
    """The cost of values that travel as they are."""
    return measure_coding(CastCodec(dtype=torch.bfloat16), num_features)


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
        chunk_values = CHUNK_VALUES[self.transport]
        num_chunks = len(chunks_of(hops, num_tokens, self.num_features, self.world_size, chunk_values))
        overlapped_s = max(coding_s, wire_s) + min(coding_s, wire_s) / num_chunks
        return num_latencies * (self.link.delay_s + MESSAGE_S[self.transport]) + overlapped_s

    def _ring_s(self, num_tokens: int) -> float:
        num_values, num_steps = num_tokens * self.num_features, 2 * (self.world_size - 1)
        messages_s = num_steps * self.link.delay_s + NATIVE_MESSAGES_S
        return messages_s + self._wire_s(2 * num_values * num_steps / self.world_size) + num_values * NATIVE_VALUE_S

    def _wire_s(self, nbytes: float) -> float:
        return 8 * nbytes / (TCP_SHARE * self.link.rate_bps)

    def message_s(self, nbytes: int) -> float:
        """Seconds until what a rank sends once, `nbytes` in all, has arrived."""
        return self.link.delay_s + MESSAGE_S[self.transport] + self._wire_s(nbytes)

    def break_even_nbytes(self, choice: Choice) -> int | None:
        """Bytes of the smallest tensor whose sum is faster by `choice` than natively; None if none up to 1 GiB is."""
        num_tokens = 1
        while 2 * num_tokens * self.num_features <= LARGEST_NBYTES:
            seconds = self.sum_s(choice, num_tokens)
            if seconds is not None and seconds < self._ring_s(num_tokens):
                return 2 * num_tokens * self.num_features
            num_tokens = max(num_tokens + 1, num_tokens * 5 // 4)
        return None
