"""one_shot: every rank sends its whole payload to every other, and each adds all of them up.

One latency, one rounding; (R - 1) payloads sent by each rank, which is more than a BF16 ring sends from about
eight ranks on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.collectives.base import Algorithm, CodingWork, Filling, Hops, Sent, to_all


def _steps(x_TE: Tensor, y_TE: Tensor, hops: Hops, rank: int, world_size: int, stats: Tensor | None) -> Filling:
    codec = hops.codecs[0]
    num_tokens, num_features = x_TE.shape
    shape = world_size, num_tokens, codec.row_nbytes(num_features)
    payloads_RTB = torch.empty(shape, dtype=torch.uint8, device=x_TE.device)
    codec.encode(x_TE, source=rank, out=payloads_RTB[rank], stats=stats)
    yield to_all(payloads_RTB[rank], payloads_RTB.unbind(), rank, x_TE.numel())
    codec.decode_sum(payloads_RTB, out=y_TE)


def _twin(partials: Sequence[Tensor], hops: Hops, stats: Tensor | None) -> Tensor:
    codec = hops.codecs[0]
    payloads_RTB = torch.stack([codec.encode(x_TE, source=rank, stats=stats) for rank, x_TE in enumerate(partials)])
    return codec.decode_sum(payloads_RTB, dtype=partials[0].dtype, num_features=partials[0].shape[1])


def _sent(hops: Hops, num_tokens: int, num_features: int, rank: int, world_size: int) -> Sent:
    peers = world_size - 1
    return Sent.once(peers * hops.codecs[0].payload_nbytes(num_tokens, num_features), peers * num_tokens * num_features)


def _work(num_values: int, world_size: int) -> CodingWork:
    return CodingWork(1, num_values, world_size * num_values)


ONE_SHOT = Algorithm(num_hops=1, recodes=False, steps=_steps, twin=_twin, sent=_sent, work=_work, kernels_only=True)
