"""Attention of continuous batching: tokens of many sequences in one row, their keys in the pages of one cache.

Transformers' SDPA gathers the keys of all sequences in each layer, and masks for each token those of all others. Here a
sequence attends to its own: few queries to keys in their pages, a long prompt to those that are gathered for it.

Shapes: H heads, G heads of keys and values, T tokens of all sequences, N places of keys, D values of a head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from narrowcast.runtime.attention import Paged, attend, fits

Span = tuple[int, int]


@torch.compiler.disable  # type: ignore[untyped-decorator] # as Transformers' own: caches change in place
def attention(
    allocator: Any,
    layer: int,
    q_1HTD: Tensor,
    k_1GTD: Tensor,
    v_1GTD: Tensor,
    alone: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    scale: float,
    softcap: float,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Mapping[str, Tensor],
    max_length_q: int,
    read_index: Sequence[Tensor],
    write_index: Sequence[Tensor],
    **_: Any,
) -> Tensor:
    """The outputs [1, T, H, D] of new tokens, which go into the cache; zeros for those that are padding.

    `alone`: the attention of one sequence whose keys are gathered. `softcap`: 0 for none. What has to be named is from
    Transformers' PagedAttentionArgs.
    """
    read, write = read_index[allocator.index], write_index[allocator.index]
    k_1GND, v_1GND, places = _kept(allocator, layer, k_1GTD, v_1GTD, read, write, one_each=max_length_q == 1)
    out_1THD = torch.zeros_like(q_1HTD.transpose(1, 2), memory_format=torch.contiguous_format)
    window = getattr(allocator, "sliding_window", None)
    tokens, spans = cu_seq_lens_q.tolist(), cu_seq_lens_k[allocator.layer_type].tolist()
    for those, keys in _together(list(pairwise(tokens)), list(pairwise(spans))):
        q_BHTD = q_1HTD[0][:, those].unflatten(1, (len(keys), -1)).transpose(0, 1)
        mask = _seen(q_BHTD.shape[2], keys[0][1] - keys[0][0], window, q_BHTD.device)
        paged = Paged(places, torch.tensor(keys))
        if fits(q_BHTD, k_1GND, v_1GND, mask, paged):
            found = attend(
                q_BHTD, k_1GND, v_1GND, scale=scale, softcap=softcap, mask=mask, causal=mask is None, paged=paged
            )
        else:
            gathered = [(k_1GND[:, :, own], v_1GND[:, :, own]) for own in (places[slice(*span)] for span in keys)]
            found = torch.cat([alone(q, *kv, mask) for q, kv in zip(q_BHTD.split(1), gathered, strict=True)])
        out_1THD[0, those] = found.flatten(0, 1)
    return out_1THD


def _kept(
    allocator: Any, layer: int, k_1GTD: Tensor, v_1GTD: Tensor, read: Tensor, write: Tensor, *, one_each: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [1, G, N, D], new ones among them, and the places in there that sequences have."""
    k_TGD, v_TGD = k_1GTD[0].transpose(0, 1), v_1GTD[0].transpose(0, 1)
    slides = hasattr(allocator, "sliding_window")
    if len(read) == 0 or (slides and not one_each):
        # All keys are new, or new ones of a window take the places of those that earlier queries see.
        k_NGD, v_NGD = allocator.update(k_TGD, v_TGD, layer, read, write)
        places = torch.arange(len(k_NGD), device=k_NGD.device)
    else:
        allocator.update(k_TGD, v_TGD, layer, read[:0], write)  # which reads nothing
        k_NGD, v_NGD = allocator._kv_token_views[layer]
        k_NGD = k_NGD[: len(v_NGD)]
        places = read.masked_scatter(read == allocator.sentinel_index, write) if slides else read
    return k_NGD.transpose(0, 1)[None], v_NGD.transpose(0, 1)[None], places


def _together(tokens: list[Span], keys: list[Span]) -> Iterator[tuple[slice | list[int], list[Span]]]:
    """Tokens that are attended for in one call, and the keys of each of their sequences.

    Sequences of one token are, and each other one by itself. Those without tokens are padding.
    """
    single = [b for b, (begin, end) in enumerate(tokens) if end - begin == 1]
    if len(single) == tokens[-1][1]:
        yield slice(0, len(single)), [keys[b] for b in single]
        return
    if single:
        yield [tokens[b][0] for b in single], [keys[b] for b in single]
    for (begin, end), own in zip(tokens, keys, strict=True):
        if end - begin > 1:
            yield slice(begin, end), [own]


def _seen(num_queries: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask [1, 1, T, C] of the last queries of a sequence; None for one that sees all, and for a whole text."""
    slides = window is not None and context > window
    if num_queries == 1 or (num_queries == context and not slides):
        return None
    seen = torch.ones(num_queries, context, dtype=torch.bool, device=device).tril(context - num_queries)
    return (seen.triu(context - num_queries - (window or 0) + 1) if slides else seen)[None, None]
