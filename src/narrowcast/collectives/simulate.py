"""The twins: what the collectives give, computed in one process from the tensors of all ranks.

They are the specification: real ranks end with the same bits, whatever the transport. Evaluation uses them to
measure the accuracy of any `tp_size` on one machine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.algorithms import ALGORITHMS, checked_stages, choose, source_of
from narrowcast.collectives.base import share_of


def all_reduce(
    partials: Sequence[Tensor],
    *,
    codec: Codec | Sequence[Codec],
    algorithm: str = "auto",
    stats: Tensor | None = None,
) -> Tensor:
    """The sum [..., E] that every rank ends with; `partials[rank]` is what that rank puts in."""
    world_size, shape = len(partials), partials[0].shape
    stages = checked_stages(codec, world_size)
    flat = [x.reshape(-1, shape[-1]) for x in partials]
    name = choose(algorithm, stages, len(flat[0]), shape[-1], world_size)
    return ALGORITHMS[name].twin(flat, stages, stats).view(shape)


def reduce_scatter(partials: Sequence[Tensor], *, codec: Codec) -> list[Tensor]:
    """The tokens of the sum that each rank ends with; `partials[rank]` [T, E] is what that rank puts in."""
    (stage, *_) = checked_stages(codec, len(partials))
    payloads_RTB = torch.stack([stage.encode(x_TE, source=rank) for rank, x_TE in enumerate(partials)])
    total_TE = stage.decode_sum(payloads_RTB, dtype=partials[0].dtype, num_features=partials[0].shape[1])
    return [total_TE[share_of(len(total_TE), rank, len(partials))] for rank in range(len(partials))]


def all_gather(parts: Sequence[Tensor], *, codec: Codec) -> Tensor:
    """All ranks' tokens [T0 + T1 + ..., E] in rank order, as every rank decodes them."""
    decoded = []
    for rank, x_TE in enumerate(parts):
        source = source_of(codec, rank, len(parts))
        payload_TB = codec.encode(x_TE, source=source)
        decoded.append(codec.decode(payload_TB, source=source, dtype=x_TE.dtype, num_features=x_TE.shape[1]))
    return torch.cat(decoded)
