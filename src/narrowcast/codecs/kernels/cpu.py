"""C++ kernels for CPU tensors, reached past PyTorch's dispatcher, which costs more than the call (decision 0014).

An address has no shape: `Codec` checks shapes and dtypes before it comes here.
"""

import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

native: ModuleType | None
try:
    from narrowcast import _native as native
except ImportError:  # there was no compiler at the install
    native = None

enabled = native is not None

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_SCALES = {"bf16": 0, "e8m0": 1, "e4m3": 2}
_BLOCK = 32  # features of `allocated` that share a width
_LARGE = 1 << 19  # values from which on several threads may share a tensor


class Kernel:
    """The kernels of one codec: its `form` in C++, and the tensors that the form points to."""

    def __init__(self, form: object, *tensors: Tensor) -> None:
        self.form, self._tensors = form, tensors

    def encode(self, x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
        """Code [T, E] into uint8 [T, B]."""
        assert native is not None
        num_tokens, num_features = x_TE.shape
        if num_tokens * num_features >= _LARGE:
            _limit_threads()
        native.encode(
            self.form,
            x_TE.data_ptr(),
            _DTYPES[x_TE.dtype],
            num_tokens,
            num_features,
            x_TE.stride(0),
            source,
            out_TB.data_ptr(),
            out_TB.stride(0),
            0 if stats is None else stats.data_ptr(),
        )

    def decode_sum(self, payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
        """Decode the payloads of the sources from `first_source` on and add them up."""
        assert native is not None
        num_tokens, num_features = out_TE.shape
        if num_tokens * num_features >= _LARGE:
            _limit_threads()
        native.decode_sum(
            self.form,
            payloads_RTB.data_ptr(),
            len(payloads_RTB),
            payloads_RTB.stride(0),
            payloads_RTB.stride(1),
            first_source,
            out_TE.data_ptr(),
            _DTYPES[out_TE.dtype],
            num_tokens,
            num_features,
            out_TE.stride(0),
        )

    def recode(
        self, payloads_RTB: Tensor, reduced: "Kernel", num_features: int, out_TB: Tensor, stats: Tensor | None
    ) -> None:
        """Decode the payloads of all sources, add them up, and code the sum with `reduced`."""
        assert native is not None
        num_tokens = len(out_TB)
        if num_tokens * num_features >= _LARGE:
            _limit_threads()
        native.recode(
            self.form,
            payloads_RTB.data_ptr(),
            len(payloads_RTB),
            payloads_RTB.stride(0),
            payloads_RTB.stride(1),
            reduced.form,
            num_tokens,
            num_features,
            out_TB.data_ptr(),
            out_TB.stride(0),
            0 if stats is None else stats.data_ptr(),
        )


def cast(dtype: torch.dtype) -> Kernel | None:
    """The kernels of a `cast` codec."""
    return Kernel(native.cast(_DTYPES[dtype])) if native else None


def feature(
    num_bits: int,
    scale_RE: Tensor,
    reciprocal_RE: Tensor,
    outliers_K: Tensor,
    holes: Tensor,
    fillers: Tensor,
    guard: tuple[int, int] | None,
) -> Kernel | None:
    """The kernels of a `feature` codec; `guard` codes in so many bits, in groups of so many features."""
    if native is None or not scale_RE.is_cpu:
        return None
    by_slot_RE = scale_RE.float().index_copy(1, holes, scale_RE[:, fillers].float())
    tensors = [each.contiguous() for each in (by_slot_RE, reciprocal_RE, outliers_K, holes, fillers)]
    scale, reciprocal, outliers, holes, fillers = tensors
    form = native.feature(
        num_bits,
        scale.shape[1],
        scale.data_ptr(),
        reciprocal.data_ptr(),
        outliers.data_ptr(),
        len(outliers),
        holes.data_ptr(),
        fillers.data_ptr(),
        len(holes),
        _is_tame(scale, num_bits),
        *(guard or (0, 0)),
    )
    return Kernel(form, *tensors)


def group(num_bits: int, group_size: int, symmetric: bool, spikes: bool) -> Kernel | None:
    """The kernels of a `group` codec."""
    return Kernel(native.group(num_bits, group_size, symmetric, spikes)) if native else None


def minifloat(
    num_bits: int, mantissa_bits: int, smallest_exponent: int, largest_code: int, scale: str, block_size: int | None
) -> Kernel | None:
    """The kernels of a `minifloat` codec; the element's numbers are those of `FloatFormat`."""
    if native is None:
        return None
    element = num_bits, mantissa_bits, smallest_exponent, largest_code
    return Kernel(native.minifloat(*element, _SCALES[scale], block_size or 0))


def allocated(
    scale_RE: Tensor,
    reciprocal_RE: Tensor,
    order_RE: Tensor,
    widths_RN: Tensor,
    num_escapes: int,
    row_nbytes: int,
    tables: Sequence[Tensor],
) -> Kernel | None:
    """The kernels of an `allocated` codec; reciprocals are zero where a feature is sent in BF16."""
    if native is None or not scale_RE.is_cpu:
        return None
    num_features, num_blocks = scale_RE.shape[1], widths_RN.shape[1]
    missing = 0, _BLOCK * num_blocks - num_features
    by_slot_RE = torch.nn.functional.pad(scale_RE.float().gather(1, order_RE.long()), missing)
    order = torch.nn.functional.pad(order_RE, missing, value=num_features).to(torch.int16)  # its bits, unsigned
    slots = torch.nn.functional.pad(order_RE.argsort(dim=1), missing).to(torch.int16)
    tensors = [each.contiguous() for each in (by_slot_RE, reciprocal_RE, order, slots, widths_RN, *tables)]
    sizes = num_features, num_blocks, num_escapes, row_nbytes
    same_order = torch.equal(order_RE, order_RE[:1].expand_as(order_RE))
    return Kernel(native.allocated(*sizes, same_order, *(each.data_ptr() for each in tensors)), *tensors)


def _is_tame(scale_RE: Tensor, num_bits: int) -> bool:
    """Whether no sum of values overflows or is subnormal.

    Values are whole multiples of a BF16 scale, hence of 2**-7 times the power of two below it, and so are their sums.
    """
    largest = scale_RE.amax(dim=1).double().sum() * 2 ** (num_bits - 1)
    return bool(largest < 2.0**127 and scale_RE.min() >= 2.0**-118)


def cores_of_this_rank() -> int:
    """The cores that the ranks of this host leave to each of them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _limit_threads() -> None:
    assert native is not None
    native.limit_threads(min(torch.get_num_threads(), cores_of_this_rank()))
