"""C++ kernels for CPU tensors, reached past PyTorch's dispatcher, which costs more than the call (decision 0014).

A codec's parameters become one C++ object, its form, the first time that a kernel is asked for it.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from narrowcast.codecs import trellis
from narrowcast.codecs.allocation import AS_BF16, BLOCK
from narrowcast.codecs.kernels import reference
from narrowcast.codecs.token_scale import TOKEN_SCALES

if TYPE_CHECKING:
    from narrowcast.codecs.allocated import AllocatedCodec
    from narrowcast.codecs.base import Codec
    from narrowcast.codecs.cast import CastCodec
    from narrowcast.codecs.feature import FeatureCodec
    from narrowcast.codecs.group import GroupCodec
    from narrowcast.codecs.minifloat import MinifloatCodec

native: ModuleType | None
try:
    from narrowcast import _native as native
except ImportError:  # there was no compiler at the install
    native = None

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_SCALES = {"bf16": 0, "e8m0": 1, "e4m3": 2}
_PLACES, _PLACES_PER_UNIT, _BEYOND_EDGES = 2048, 128, 8.0  # of `up_to` in `_quantizers`
_LARGE = 1 << 19  # values from which on several threads may share a tensor


class _Noted:
    def __init__(self, module: ModuleType, note: Callable[[str, Any], Any]) -> None:
        self._module, self._note = module, note

    def __getattr__(self, name: str) -> Any:
        return self._note(name, getattr(self._module, name))


@contextmanager
def noted(note: Callable[[str, Any], Any]) -> Iterator[None]:
    """Let `note` see each function of the compiled module that is asked for, in any thread, and choose what runs."""
    global native
    before = native
    assert before is not None
    native = cast(ModuleType, _Noted(before, note))
    try:
        yield
    finally:
        native = before


def encode(codec: "Codec", x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
    """Code [T, E] into uint8 [T, B]."""
    assert native is not None
    num_tokens, num_features = x_TE.shape
    if num_tokens * num_features >= _LARGE:
        limit_threads()
    native.encode(
        form_of(codec),
        x_TE.data_ptr(),
        DTYPES[x_TE.dtype],
        num_tokens,
        num_features,
        x_TE.stride(0),
        source,
        out_TB.data_ptr(),
        out_TB.stride(0),
        0 if stats is None else stats.data_ptr(),
    )


def encode_with_residue(
    codec: "Codec", x_TE: Tensor, residue_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None
) -> None:
    """Code x + residue, and leave in the residue what is lost."""
    assert native is not None
    num_tokens, num_features = x_TE.shape
    if num_tokens * num_features >= _LARGE:
        limit_threads()
    native.encode_with_residue(
        form_of(codec),
        x_TE.data_ptr(),
        DTYPES[x_TE.dtype],
        num_tokens,
        num_features,
        x_TE.stride(0),
        residue_TE.data_ptr(),
        residue_TE.stride(0),
        source,
        out_TB.data_ptr(),
        out_TB.stride(0),
        0 if stats is None else stats.data_ptr(),
    )


def decode_sum(codec: "Codec", payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
    """Decode the payloads of the sources from `first_source` on and add them up."""
    assert native is not None
    num_tokens, num_features = out_TE.shape
    if num_tokens * num_features >= _LARGE:
        limit_threads()
    native.decode_sum(
        form_of(codec),
        payloads_RTB.data_ptr(),
        len(payloads_RTB),
        payloads_RTB.stride(0),
        payloads_RTB.stride(1),
        first_source,
        out_TE.data_ptr(),
        DTYPES[out_TE.dtype],
        num_tokens,
        num_features,
        out_TE.stride(0),
    )


def recode(
    codec: "Codec",
    payloads_RTB: Tensor,
    reduced: "Codec",
    num_features: int,
    out_TB: Tensor,
    stats: Tensor | None,
) -> None:
    """Decode the payloads of all sources, add them up, and code the sum with `reduced`, in one pass."""
    assert native is not None
    if reduced.id not in FORMS:
        return reference.recode(codec, payloads_RTB, reduced, num_features, out_TB, stats)
    num_tokens = len(out_TB)
    if num_tokens * num_features >= _LARGE:
        limit_threads()
    native.recode(
        form_of(codec),
        payloads_RTB.data_ptr(),
        len(payloads_RTB),
        payloads_RTB.stride(0),
        payloads_RTB.stride(1),
        form_of(reduced),
        num_tokens,
        num_features,
        out_TB.data_ptr(),
        out_TB.stride(0),
        0 if stats is None else stats.data_ptr(),
    )


def form_of(codec: "Codec") -> Any:
    """The codec in C++."""
    return (codec.prepared.get("cpu") or _prepare(codec))[0]


def _prepare(codec: "Codec") -> tuple[Any, ...]:
    """The codec in C++, its form, with the tensors that the form points to.

    Of threads that come here at once all take the first one's: no form goes while another thread is in it.
    """
    made: tuple[Any, ...] = codec.prepared.setdefault("cpu", FORMS[codec.id](codec))
    return made


def _cast(codec: "CastCodec") -> tuple[object]:
    assert native is not None
    return (native.cast(DTYPES[codec.dtype]),)


def _feature(codec: "FeatureCodec") -> tuple[object, ...]:
    assert native is not None
    tables = codec.tables.on(torch.device("cpu"))
    by_slot_RE = tables.scale.float().index_copy(1, tables.holes, tables.scale[:, tables.fillers].float())
    others = tables.reciprocal, tables.outliers, tables.holes, tables.fillers
    tensors = [each.contiguous() for each in (by_slot_RE, *others)]
    scale, reciprocal, outliers, holes, fillers = tensors
    form = native.feature(
        codec.num_bits,
        scale.shape[1],
        scale.data_ptr(),
        reciprocal.data_ptr(),
        outliers.data_ptr(),
        len(outliers),
        holes.data_ptr(),
        fillers.data_ptr(),
        len(holes),
        _is_tame(scale, codec.num_bits),
        *(codec.guard or (0, 0)),
    )
    return form, *tensors


def _group(codec: "GroupCodec") -> tuple[object]:
    assert native is not None
    return (native.group(codec.num_bits, codec.group_size, codec.symmetric, codec.spikes),)


def _minifloat(codec: "MinifloatCodec") -> tuple[object]:
    assert native is not None
    form = codec.form
    element = form.num_bits, form.mantissa_bits, form.smallest_exponent, form.largest_code
    return (native.minifloat(*element, _SCALES[codec.scale], codec.block_size or 0),)


def _allocated(codec: "AllocatedCodec") -> tuple[object, ...]:
    """Reciprocals are zero where a feature is sent in BF16."""
    assert native is not None
    tables, widths_RN = codec.tables.on(torch.device("cpu")), codec.widths.cpu()
    num_features, num_blocks = tables.scale.shape[1], widths_RN.shape[1]
    missing = 0, BLOCK * num_blocks - num_features
    pad, order_RE = torch.nn.functional.pad, tables.order
    as_bf16_RE = widths_RN.repeat_interleave(BLOCK, dim=1)[:, :num_features] == AS_BF16
    is_bf16_RE = torch.zeros_like(as_bf16_RE).scatter(1, order_RE.long(), as_bf16_RE)
    token = TOKEN_SCALES.on(torch.device("cpu"))
    tensors = [
        pad(tables.scale.float().gather(1, order_RE.long()), missing),
        tables.reciprocal.masked_fill(is_bf16_RE, 0.0),
        pad(order_RE, missing, value=num_features).to(torch.int16),  # its bits, unsigned
        pad(order_RE.argsort(dim=1), missing).to(torch.int16),
        widths_RN,
        token.scales,
        token.reciprocals,
        pad(token.edges, (0, 256 - len(token.edges)), value=torch.nan),
        *_quantizers(),
    ]
    tensors = [each.contiguous() for each in tensors]
    sizes = num_features, num_blocks, codec.num_escapes, codec.row_nbytes(num_features)
    same_order = torch.equal(order_RE, order_RE[:1].expand_as(order_RE))
    form = native.allocated(*sizes, same_order, *(each.data_ptr() for each in tensors))
    return form, *tensors


@functools.cache
def _quantizers() -> tuple[Tensor, ...]:
    """The trellis's levels, then what encoders look up, in units of 2**-width. All have a row for each of its tables.

    `by_subset`: levels of each subset, [16, 4, 128]. `edges`, [16, 512], and these in the order in which bisection
    takes them, the middle one first, then those of the two halves. `nearest`: the nearest level in each subset by how
    many edges are not above a value, [16, 512, 4]. `up_to`: how many lie below place / 128 - 8, int16 [16, 2048]: at
    most two lie between two places.
    """
    levels, edges = trellis.tables().on(torch.device("cpu"))
    unit = 2.0 ** torch.arange(1, trellis.MAX_BITS + 1).repeat(2)[:, None]
    by_subset = (levels * unit).unflatten(1, (-1, trellis.SUBSETS)).mT
    count, subset = torch.arange(edges.shape[1])[:, None], torch.arange(trellis.SUBSETS)
    last = torch.arange(2, trellis.MAX_BITS + 2).exp2().repeat(2).long()[:, None, None] - trellis.SUBSETS
    of_count = torch.minimum(count, last) + 3 - subset >> 2
    nearest = (levels * unit).gather(1, ((of_count << 2) + subset).flatten(1)).unflatten(1, (-1, trellis.SUBSETS))
    finite = edges.masked_fill(edges.isinf(), math.nan)  # infinity itself is not above what stands behind them
    bisected = torch.full_like(edges, math.nan)
    for row, num_bits in enumerate([*range(1, trellis.MAX_BITS + 1)] * 2):
        for depth in range(num_bits + 1):
            step = 2 ** (num_bits - depth)
            taken = finite[row, step - 1 : 2 ** (num_bits + 1) - 1 : 2 * step]
            bisected[row, 2**depth - 1 : 2 ** (depth + 1) - 1] = taken
    places = torch.arange(_PLACES) / _PLACES_PER_UNIT - _BEYOND_EDGES
    up_to = torch.stack([torch.bucketize(places, row) for row in edges]).to(torch.int16)
    return levels, by_subset.contiguous(), edges * unit, bisected * unit, nearest.contiguous(), up_to


# How a codec of each format becomes a form, with the tensors that the form points to.
FORMS: dict[str, Callable[[Any], tuple[object, ...]]] = {
    "cast": _cast,
    "feature": _feature,
    "group": _group,
    "minifloat": _minifloat,
    "allocated": _allocated,
}


def _is_tame(scale_RE: Tensor, num_bits: int) -> bool:
    """True where no sum of values overflows or is subnormal.

    Values are whole multiples of a BF16 scale, hence of 2**-7 times the power of two below it, and so are their sums.
    """
    largest = scale_RE.amax(dim=1).double().sum() * 2 ** (num_bits - 1)
    return bool(largest < 2.0**127 and scale_RE.min() >= 2.0**-118)


def cores_of_this_rank() -> int:
    """The cores that the ranks of this host leave to each of them."""
    return _cores_among(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@functools.cache
def _cores_among(num_ranks: str) -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(num_ranks))


def limit_threads() -> None:
    """Let kernels have the threads of PyTorch, but no more than this rank's cores."""
    assert native is not None
    native.limit_threads(min(torch.get_num_threads(), cores_of_this_rank()))
