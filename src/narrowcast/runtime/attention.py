"""Attention of few queries, as decoding has it: keys and values are read once, for all queries that share them.

PyTorch's own for CPUs is made for many queries: with one, in BF16, over 1024 keys of 16 heads of 128, it takes ten
times as long as reading them.

Shapes: B sequences, H heads, G heads of keys and values, T queries, C keys, D values of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narrowcast.codecs import kernels
from narrowcast.codecs.kernels import cpu
from narrowcast.runtime import attention_reference as reference

MOST_QUERIES = 16  # of a sequence: with more PyTorch's blocks of queries win (benchmarks/results/decoding.json)
MOST_HEAD_DIM = 256
_LARGE = 1 << 18  # products from which on several threads may share the keys

Place = tuple[int, int, int, int]
NOWHERE: Place = (0, 0, 0, 0)


class NewTokens(NamedTuple):
    """New tokens of a step: their keys and values [B, G, T, D], not turned yet, and what turns queries and keys.

    `cos`, `sin`: [B or 1, T, size], of the first `size` values of each head.
    """

    k_BGTD: Tensor
    v_BGTD: Tensor
    cos_BTR: Tensor
    sin_BTR: Tensor

    def fit(self, q_BHTD: Tensor) -> bool:
        """True if they can go along with these queries."""
        num_sequences, _, num_tokens, head_dim = q_BHTD.shape
        (num_turns, *sizes), (k, v, cos, _) = self.cos_BTR.shape, self
        return (
            all(type(x) is Tensor and x.dtype is q_BHTD.dtype for x in self)
            and len(k) == len(v) == num_sequences
            and k.shape[2:] == v.shape[2:] == (num_tokens, head_dim)
            and k.stride(3) == v.stride(3) == 1
            and cos.shape == self.sin_BTR.shape
            and num_turns in (1, num_sequences)
            and sizes[0] == num_tokens
            and sizes[1] <= head_dim
            and sizes[1] % 2 == 0
        )


class Paged(NamedTuple):
    """Where the keys of each sequence are in one cache [1, G, C, D] of all: a sequence has places[begin:end], in order.

    `places`: int64 [N]. `spans`: int64 [B, 2], the begin and end of each sequence.
    """

    places: Tensor
    spans: Tensor

    def fit(self, q_BHTD: Tensor) -> bool:
        """True if there is a span for each sequence of these queries."""
        return (
            all(type(x) is Tensor and x.is_cpu and x.dtype is torch.int64 and x.is_contiguous() for x in self)
            and self.places.dim() == 1
            and self.spans.shape == (len(q_BHTD), 2)
        )


def fits(
    q_BHTD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, mask: Tensor | None = None, paged: Paged | None = None
) -> bool:
    """True if these are few queries of plain tensors on the CPU. Shapes, dtypes and devices decide, so ranks agree."""
    num_heads, num_queries, head_dim = q_BHTD.shape[1:]
    return (
        type(q_BHTD) is type(k_BGCD) is type(v_BGCD) is Tensor
        and q_BHTD.is_cpu
        and 0 < num_queries <= MOST_QUERIES
        and num_queries <= k_BGCD.shape[2] == v_BGCD.shape[2]
        and head_dim % 8 == 0
        and head_dim <= MOST_HEAD_DIM
        and head_dim == k_BGCD.shape[3] == v_BGCD.shape[3]
        and len(k_BGCD) == len(v_BGCD) == (len(q_BHTD) if paged is None else 1)
        and (paged is None or paged.fit(q_BHTD))
        and num_heads % k_BGCD.shape[1] == 0
        and k_BGCD.shape[1] == v_BGCD.shape[1]
        and q_BHTD.dtype == k_BGCD.dtype == v_BGCD.dtype
        and q_BHTD.dtype in cpu.DTYPES
        and q_BHTD.stride(3) == k_BGCD.stride(3) == v_BGCD.stride(3) == 1
        and (mask is None or is_mask(mask, q_BHTD, k_BGCD.shape[2] if paged is None else mask.shape[-1]))
    )


def is_mask(mask: Tensor, q_BHTD: Tensor, context: int) -> bool:
    """True for one that says of each key whether it is seen, or what is added to its score."""
    sizes = (len(q_BHTD), *q_BHTD.shape[1:3], context)
    alike = mask.dim() == 4 and all(have in (1, want) for have, want in zip(mask.shape, sizes, strict=True))
    return alike and mask.shape[3] == context and mask.dtype in (torch.bool, torch.float32, q_BHTD.dtype)


def attend(
    q_BHTD: Tensor,
    k_BGCD: Tensor,
    v_BGCD: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    new: NewTokens | None = None,
    paged: Paged | None = None,
) -> Tensor:
    """The attention [B, T, H, D] of few queries, of their dtype, computed in FP32; for tensors that `fits`.

    `mask`: [B or 1, H or 1, T or 1, C], bool (True is seen), or added to scores. `softcap`: limits scores, 0 for none.
    `causal`: query t sees all but the last T - t - 1 keys. A query that sees nothing gives zeros.
    `new`: first goes into the last T places of `k_BGCD` and `v_BGCD`, turned, as queries are turned too.
    `paged`: keys are where it says, without `new`; a sequence has T or more, and no more than a mask's C. ValueError
    for places that are not in the cache, and for spans that are none.
    Bits depend neither on the path nor on threads, other heads or other sequences.
    """
    assert new is None or paged is None
    (num_sequences, num_heads, num_queries, head_dim), context = q_BHTD.shape, k_BGCD.shape[2]
    if cpu.native is None or kernels.reference_is_forced():
        if new is not None:
            q_BHTD = reference.append(q_BHTD, k_BGCD, v_BGCD, *new)
        if paged is not None:
            return reference.attend_paged(q_BHTD, k_BGCD, v_BGCD, *paged, scale, mask, softcap, causal)
        return reference.attend(q_BHTD, k_BGCD, v_BGCD, scale, mask, softcap, causal)
    places = (0, 0, 0, 0)
    if paged is not None:
        places = paged.places.data_ptr(), len(paged.places), context, paged.spans.data_ptr()
        context = len(paged.places) if mask is None else mask.shape[3]
        k_BGCD, v_BGCD = (x.expand(num_sequences, -1, -1, -1) for x in (k_BGCD, v_BGCD))
    if q_BHTD.numel() * context >= _LARGE:
        cpu.limit_threads()
    out_BTHD = q_BHTD.new_empty(num_sequences, num_queries, num_heads, head_dim)
    mask_kind, mask_dtype, mask_place, mask_key = _of_mask(mask, (num_sequences, num_heads, num_queries, context))
    turned = (NOWHERE, NOWHERE, 0, 0, 0, 0, 0) if new is None else _of_new(new)
    cpu.native.attend(
        cpu.DTYPES[q_BHTD.dtype],
        num_sequences,
        num_heads,
        k_BGCD.shape[1],
        num_queries,
        context,
        head_dim,
        scale,
        softcap,
        causal,
        place_of(q_BHTD),
        place_of(k_BGCD),
        place_of(v_BGCD),
        (out_BTHD.data_ptr(), num_queries * num_heads * head_dim, head_dim, num_heads * head_dim),
        mask_kind,
        mask_dtype,
        mask_place,
        mask_key,
        *turned,
        *places,
    )
    return out_BTHD


def place_of(x_BHTD: Tensor) -> Place:
    """The address of a tensor, and its strides by sequence, head and token."""
    sequence, head, token, _ = x_BHTD.stride()
    return x_BHTD.data_ptr(), sequence, head, token


def _of_mask(mask: Tensor | None, sizes: Sequence[int]) -> tuple[int, int, Place, int]:
    if mask is None:
        return 0, 0, NOWHERE, 0
    sequence, head, query, key = mask.expand(sizes).stride()
    kind, dtype = (1, 0) if mask.dtype is torch.bool else (2, cpu.DTYPES[mask.dtype])
    return kind, dtype, (mask.data_ptr(), sequence, head, query), key


def _of_new(new: NewTokens) -> tuple[Place, Place, int, int, int, int, int]:
    cos_BTR, sin_BTR = new.cos_BTR.contiguous(), new.sin_BTR.contiguous()
    num_sequences, num_tokens, size = cos_BTR.shape
    between = num_tokens * size if num_sequences > 1 else 0
    return place_of(new.k_BGTD), place_of(new.v_BGTD), cos_BTR.data_ptr(), sin_BTR.data_ptr(), between, size, size
