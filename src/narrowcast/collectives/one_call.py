"""Sums of few values in one native call: the steps of an algorithm, recorded as they run once, and run again in C++.

A small sum takes a few microseconds of coding and sending, and many of Python. So the first one of its kind takes the
steps as ever, and what they do, kernels and exchanges, is noted with the places of their tensors: in x, y, the residue,
or a payload that lives on. The next ones do the same at once (csrc/sums), with other x, y and residue.

Shapes: T tokens, E features, R ranks, B payload bytes of a token.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from narrowcast.codecs import Codec, kernels
from narrowcast.codecs.kernels import cpu
from narrowcast.collectives.base import Exchange, Filling
from narrowcast.collectives.pending import first_tag
from narrowcast.transport.tcp import TcpTransport, travelling

if TYPE_CHECKING:
    from narrowcast import _native

MAX_NBYTES = 64 << 10  # of a tensor; from there on its bytes take longer than Python

Place = tuple[int, int]  # see _native.pyi


@dataclass(frozen=True)
class OneCall:
    """A recorded sum. Not to be run again after an error: bytes may still be on their way into its payloads."""

    transport: TcpTransport
    steps: "_native.Sum"

    def run(self, x_TE: Tensor, y_TE: Tensor, residue_STE: Tensor | None, stats: Tensor) -> None:
        """Fill `y_TE` with the sum; all tensors of the shapes, dtypes and strides of those that were recorded.

        Raises as the steps do.
        """
        outcome = self.steps.run(
            x_TE.data_ptr(),
            y_TE.data_ptr(),
            0 if residue_STE is None else residue_STE.data_ptr(),
            stats.data_ptr(),
            first_tag(self.transport),
            self.transport.timeout_s,
        )
        if outcome is not None:
            raise self.transport.failed(outcome)


class Recording:
    """The steps of one sum of `x_TE` into `y_TE`, noted while they run."""

    def __init__(self, x_TE: Tensor, y_TE: Tensor, residue_STE: Tensor | None) -> None:
        self._tensors = [None, x_TE, y_TE, residue_STE]  # by `Base` of csrc/sums/sum.h
        self._noted: list[tuple[str, tuple[Any, ...]]] = []
        self._native_only, self._thread = True, threading.get_ident()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the kernels of this thread."""
        with kernels.noted(self._note):
            yield

    def steps(self, filling: Filling) -> Filling:
        """The same steps, whose exchanges are noted."""
        for exchange in filling:
            self._noted.append(("exchange", exchange))
            yield exchange

    def one_call(self, transport: TcpTransport) -> OneCall | None:
        """The recorded sum; None if anything in it had no kernel in C++."""
        if not self._native_only:
            return None
        made = transport.recorded_sum([each for _, arguments in self._noted for each in arguments if self._stays(each)])
        for operator, arguments in self._noted:
            getattr(self, f"_add_{operator}")(made, *arguments)
        return OneCall(transport, made)

    def _note(self, operator: str, kernel: kernels.Kernel) -> kernels.Kernel:
        if threading.get_ident() != self._thread:
            return kernel

        def run(*arguments: Any) -> None:
            self._noted.append((operator, arguments))
            coded_by = (each for each in arguments if isinstance(each, Codec))
            self._native_only &= kernel is getattr(cpu, operator) and all(codec.id in cpu.FORMS for codec in coded_by)
            kernel(*arguments)

        return run

    def _stays(self, argument: Any) -> bool:
        """Codecs and payloads are those of every call, values are not."""
        return not isinstance(argument, Tensor) or self._place(argument)[0] == 0

    def _place(self, tensor: Tensor) -> Place:
        storage = tensor.untyped_storage().data_ptr()
        for base, own in enumerate(self._tensors):
            if own is not None and own.untyped_storage().data_ptr() == storage:
                return base, tensor.data_ptr() - own.data_ptr()
        return 0, tensor.data_ptr()

    def _rows(self, x_TE: Tensor) -> tuple[Place, int, int, int, int]:
        num_tokens, num_features = x_TE.shape
        return self._place(x_TE), cpu.DTYPES[x_TE.dtype], num_tokens, num_features, x_TE.stride(0)

    def _bytes(self, payload_TB: Tensor) -> tuple[Place, int]:
        return self._place(payload_TB), payload_TB.stride(0)

    def _payloads(self, payloads_RTB: Tensor) -> tuple[Place, int, int, int]:
        return self._place(payloads_RTB), len(payloads_RTB), payloads_RTB.stride(0), payloads_RTB.stride(1)

    def _add_encode(self, made: "_native.Sum", codec: Codec, x_TE: Tensor, source: int, out: Tensor, _: Any) -> None:
        made.encode(cpu.form_of(codec), *self._rows(x_TE), source, *self._bytes(out))

    def _add_encode_with_residue(
        self, made: "_native.Sum", codec: Codec, x_TE: Tensor, residue_TE: Tensor, source: int, out: Tensor, _: Any
    ) -> None:
        lost = self._place(residue_TE), residue_TE.stride(0)
        made.encode_with_residue(cpu.form_of(codec), *self._rows(x_TE), *lost, source, *self._bytes(out))

    def _add_decode_sum(
        self, made: "_native.Sum", codec: Codec, payloads_RTB: Tensor, first_source: int, out: Tensor
    ) -> None:
        payloads, (place, *sizes) = self._payloads(payloads_RTB), self._rows(out)
        dtype, num_tokens, num_features, stride = sizes
        form = cpu.form_of(codec)
        made.decode_sum(form, *payloads, first_source, place, dtype, num_tokens, num_features, stride)

    def _add_recode(
        self, made: "_native.Sum", codec: Codec, payloads_RTB: Tensor, reduced: Codec, size: int, out: Tensor, _: Any
    ) -> None:
        payloads = self._payloads(payloads_RTB)
        made.recode(cpu.form_of(codec), *payloads, cpu.form_of(reduced), len(out), size, *self._bytes(out))

    def _add_exchange(self, made: "_native.Sum", *exchange: Any) -> None:
        sends, recvs, _ = Exchange(*exchange)
        made.exchange(travelling(sends), travelling(recvs))
