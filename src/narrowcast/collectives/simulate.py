"""The twins: what the collectives give, computed in one process from the tensors of all ranks.

They are the specification: real ranks end with the same bits, whatever the transport. Evaluation uses them to
measure the accuracy of any `tp_size` on one machine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.algorithms import checked_hops, choose, named, source_of
from narrowcast.collectives.all_to_all import check_counts
from narrowcast.collectives.base import share_of
from narrowcast.collectives.gather import blocks_of


def all_reduce(
    partials: Sequence[Tensor],
    *,
    codec: Codec | Sequence[Codec],
    algorithm: str = "auto",
    groups: Sequence[Sequence[int]] = (),
    stats: Tensor | None = None,
) -> Tensor:
    """The sum [..., E] that every rank ends with; `partials[rank]` is what that rank puts in.

    `groups`: the ranks of each node, for hierarchical.
    """
    world_size, shape = len(partials), partials[0].shape
    hops = checked_hops(codec, world_size, groups)
    flat = [x.reshape(-1, shape[-1]) for x in partials]
    name = choose(algorithm, hops, len(flat[0]), shape[-1], world_size)
    return named(name).twin(flat, hops, stats).view(shape)


def reduce_scatter(partials: Sequence[Tensor], *, codec: Codec) -> list[Tensor]:
    """The tokens of the sum that each rank ends with; `partials[rank]` [T, E] is what that rank puts in."""
    hop = checked_hops(codec, len(partials)).codecs[0]
    payloads_RTB = torch.stack([hop.encode(x_TE, source=rank) for rank, x_TE in enumerate(partials)])
    total_TE = hop.decode_sum(payloads_RTB, dtype=partials[0].dtype, num_features=partials[0].shape[1])
    return [total_TE[share_of(len(total_TE), rank, len(partials))] for rank in range(len(partials))]


def all_gather(parts: Sequence[Tensor], *, codec: Codec, stats: Tensor | None = None) -> Tensor:
    """All ranks' tokens [T0 + T1 + ..., E] in rank order, as every rank decodes them."""
    world_size = len(parts)
    return torch.cat(
        [send(x_TE, src=rank, world_size=world_size, codec=codec, stats=stats) for rank, x_TE in enumerate(parts)]
    )


def all_gather_features(parts: Sequence[Tensor], *, codec: Codec, stats: Tensor | None = None) -> Tensor:
    """All ranks' columns [T, E0 + E1 + ...] side by side, as every rank decodes them."""
    decoded = []
    blocks = blocks_of([x_TE.shape[1] for x_TE in parts])
    for rank, (x_TE, block) in enumerate(zip(parts, blocks, strict=True)):
        own = codec.part(block.start, block.stop)
        decoded.append(send(x_TE, src=rank, world_size=len(parts), codec=own, stats=stats))
    return torch.cat(decoded, dim=1)


def all_to_all(
    inputs: Sequence[Tensor], *, codec: Codec, send_counts: Sequence[Sequence[int]], stats: Tensor | None = None
) -> list[Tensor]:
    """The tokens that each rank ends with; `send_counts[src][dst]` of those of `inputs[src]` go from src to dst."""
    world_size = len(inputs)
    received: list[list[Tensor]] = [[] for _ in inputs]
    for rank, (x_TE, counts) in enumerate(zip(inputs, send_counts, strict=True)):
        check_counts(counts, [row[rank] for row in send_counts], len(x_TE), rank, world_size)
        for dst, part_TE in enumerate(x_TE.split(list(counts))):
            received[dst].append(send(part_TE, src=rank, world_size=world_size, codec=codec, stats=stats))
    return [torch.cat(parts) for parts in received]


def broadcast(x_TE: Tensor, *, src: int, world_size: int, codec: Codec, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that every rank ends with when `src` broadcasts `x_TE`."""
    return send(x_TE, src=src, world_size=world_size, codec=codec, dtype=dtype)


def send(
    x_TE: Tensor,
    *,
    src: int,
    world_size: int,
    codec: Codec,
    dtype: torch.dtype | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """The tensor that a rank receives when `src` sends it `x_TE`, in `dtype` (None: that of `x_TE`)."""
    source = source_of(codec, src, world_size)
    payload_TB = codec.encode(x_TE, source=source, stats=stats)
    return codec.decode(payload_TB, source=source, dtype=dtype or x_TE.dtype, num_features=x_TE.shape[1])
