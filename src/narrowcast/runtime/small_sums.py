"""Sums of few values on a rank: by the steps of their algorithm once, from then on in one native call."""

from collections.abc import Collection

from torch import Tensor

from narrowcast.codecs import kernels
from narrowcast.collectives import Hops, Pending, named
from narrowcast.collectives.one_call import MAX_NBYTES, OneCall, Recording
from narrowcast.collectives.reduce import filled
from narrowcast.runtime.feedback import Feedback
from narrowcast.transport import TcpTransport, Transport

MAX_CALLS = 1 << 12  # sizes of sums by site: each keeps its payloads

Key = tuple[object, ...]


class SmallSums:
    """The small sums of a rank over `transport`; what their hops feed back is `feedback`'s."""

    def __init__(self, transport: Transport | None, feedback: Feedback) -> None:
        self._transport, self._feedback = transport, feedback
        self._calls: dict[Key, OneCall | None] = {}  # None: not all of it has a kernel in C++

    def take(self, y_TE: Tensor) -> bool:
        """True for a sum of this size, if it can be made in one call here."""
        return y_TE.nbytes <= MAX_NBYTES and type(self._transport) is TcpTransport and not kernels.reference_is_forced()

    def add_up(
        self, x_TE: Tensor, y_TE: Tensor, hops: Hops, residue: Tensor | None, algorithm: str, stats: Tensor
    ) -> OneCall | None:
        """Fill `y_TE` with the sum of every rank's `x_TE`; a `residue` is taken along, and becomes what is lost.

        `hops` live as long as this. Returns the call that made it; None if steps did.
        """
        key = id(hops), algorithm, x_TE.shape, x_TE.dtype, y_TE.dtype, residue is None
        call = self._calls.get(key)
        if call is None or not x_TE.is_contiguous():
            self._by_steps(key, x_TE, y_TE, hops, residue, algorithm, stats)
            return None
        try:
            call.run(x_TE, y_TE, residue, stats)
        except BaseException:
            del self._calls[key]
            raise
        return call

    def forget(self, calls: Collection[OneCall]) -> None:
        """Make such sums by steps again: after an error bytes may still be on their way into what a call keeps."""
        self._calls = {key: call for key, call in self._calls.items() if all(call is not each for each in calls)}

    def _by_steps(
        self,
        key: Key,
        x_TE: Tensor,
        y_TE: Tensor,
        hops: Hops,
        residue: Tensor | None,
        algorithm: str,
        stats: Tensor,
    ) -> None:
        transport, chosen = self._transport, named(algorithm)
        assert isinstance(transport, TcpTransport), "who is asked to add up has been asked whether it takes the sum"
        fed_back = hops if residue is None else self._feedback.hops(hops, residue)
        steps = chosen.steps(x_TE, y_TE, fed_back, transport.rank, transport.world_size, stats)
        if key in self._calls or not chosen.kernels_only or not x_TE.is_contiguous() or len(self._calls) == MAX_CALLS:
            Pending(filled(y_TE, steps), transport).wait()
            return
        recording = Recording(x_TE, y_TE, residue)
        with recording.noting():
            Pending(filled(y_TE, recording.steps(steps)), transport).wait()
        self._calls[key] = recording.one_call(transport)
