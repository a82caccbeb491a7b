"""Calibration of a model that is split already: what each rank would send is gathered from all of them, uncoded."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.codecs import CastCodec
from narrowcast.collectives import Pending, all_gather_steps
from narrowcast.runtime.communicator import Communicator, SiteCodecs
from narrowcast.runtime.wires import Wires
from narrowcast.transport import Transport


class GatheringCommunicator(Communicator):
    """Every rank sees the values of all, as if it held the whole model, and passes them to `wires`.

    So calibration is the same on a split model as on a whole one, and ends with the same plan, on every rank.
    """

    def __init__(self, wires: Wires, tp: Transport | None, pp: Transport | None, *, device: torch.device) -> None:
        super().__init__(SiteCodecs({}, (), "auto", device), tp=tp, pp=pp)
        self._wires = wires

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        x_TE = x.reshape(-1, x.shape[-1])
        partials = self._gather(x_TE, [len(x_TE)] * self.tp.world_size)
        return self._wires.all_reduce(partials, site).view(x.shape)

    def all_reduce_linear(self, x: Tensor, weight: Tensor, site: str) -> Tensor:
        return self.all_reduce(functional.linear(x, weight), site)

    def all_gather_features(self, x: Tensor, site: str, num_features: Sequence[int]) -> Tensor:
        num_tokens = math.prod(x.shape[:-1])
        parts = self._gather(x.reshape(-1, 1), [num_tokens * num for num in num_features])
        shaped = [part.view(num_tokens, num) for part, num in zip(parts, num_features, strict=True)]
        return self._wires.all_gather_features(shaped, site).view(*x.shape[:-1], -1)

    def all_gather_tokens(self, x_TE: Tensor, site: str, num_tokens: Sequence[int]) -> Tensor:
        return self._wires.move(torch.cat(self._gather(x_TE, num_tokens)), site, 0)

    def all_to_all(self, x_TE: Tensor, site: str, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        rank, world_size = self.tp.rank, self.tp.world_size
        sent = self._gather(torch.tensor([send_counts], dtype=torch.float32), [1] * world_size)
        counts = [[int(count) for count in row[0]] for row in sent]
        everything = torch.cat(self._gather(x_TE, [sum(row) for row in counts]))
        parts = self._wires.all_to_all(everything, site, 0).split([count for row in counts for count in row])
        return torch.cat(parts[rank::world_size])

    def send(self, x: Tensor, site: str, *, dst: int) -> None:
        super().send(x, site, dst=dst)
        self._wires.move(x, site, 0)

    def recv(self, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._wires.move(super().recv(shape, site, src=src, dtype=dtype, device=device), site, 0)

    def broadcast(
        self, x: Tensor | None, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return self._wires.move(super().broadcast(x, shape, site, src=src, dtype=dtype, device=device), site, 0)

    def _gather(self, x_TE: Tensor, num_tokens: Sequence[int]) -> list[Tensor]:
        """The rows of each rank."""
        steps = all_gather_steps(x_TE, CastCodec(dtype=x_TE.dtype), num_tokens, self.tp.rank)
        return list(Pending(steps, self.tp).wait().split(list(num_tokens)))
