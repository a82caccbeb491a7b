"""The next step of all ranks, as the first one orders it: so all run the same requests with the same tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from narrowcast.engines import Pages
from narrowcast.monitoring import Snapshot
from narrowcast.transport import Transport

_LENGTH_NBYTES = 8


@dataclass(frozen=True, kw_only=True)
class Order:
    """One step. `tokens`: for the requests that the last step named. `scored`: the next tokens of the text that is
    scored, of which it `begins` with these. `asks`: for the figures of all ranks first. `ends`: there is no step any
    more.
    """

    tokens: Sequence[int] = ()
    removed: Sequence[str] = ()
    added: Sequence[tuple[str, Sequence[int]]] = ()
    scored: Sequence[int] = ()
    begins: bool = False
    asks: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step: who wants a token, their logits [N, V], and those of what was scored [T, V]."""

    names: Sequence[str] = ()
    logits_NV: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    scored_TV: Tensor | None = None


def carry_out(order: Order, pages: Pages) -> Outcome:
    """Do as all ranks do."""
    pages.take(order.tokens)
    for name in order.removed:
        pages.remove(name)
    for name, prompt in order.added:
        pages.add(name, prompt)
    scored_TV = pages.score(order.scored, begins=order.begins) if order.scored else None
    return Outcome(*pages.forward(), scored_TV)


class Orders:
    """Orders from the first rank to the others over `transport`, which names a rank that is lost; and their figures
    back, of which `snapshot` are this rank's.

    Each order is preceded by its length, and that by a sign of life from those who are to carry it out.
    """

    def __init__(self, transport: Transport, snapshot: Callable[[], Snapshot]) -> None:
        self._transport, self._snapshot = transport, snapshot
        self.leads = transport.rank == 0
        self._others = range(1, transport.world_size) if self.leads else range(1)

    def give(self, order: Order) -> None:
        """Tell the others, all of whom are there; PeerLostError names one who is not."""
        message = _packed(json.dumps(asdict(order)))
        self._exchange(_length(message), dict.fromkeys(self._others, _LENGTH_NBYTES))
        self._exchange(message, {})

    def receive(self) -> Order:
        """The next order; PeerLostError where the first rank is lost."""
        length = self._exchange(torch.zeros(_LENGTH_NBYTES, dtype=torch.uint8), {0: _LENGTH_NBYTES})
        return Order(**json.loads(_unpacked(self._exchange(None, _lengths(length))[0])))

    def gather(self) -> list[str]:
        """The snapshots of all ranks as text, in their order, at the first one; elsewhere none."""
        mine = self._snapshot().to_text()
        if not self.leads:
            message = _packed(mine)
            self._exchange(_length(message), {})
            self._exchange(message, {})
            return []
        lengths = self._exchange(None, dict.fromkeys(self._others, _LENGTH_NBYTES))
        return [mine, *map(_unpacked, self._exchange(None, _lengths(lengths)).values())]

    def _exchange(self, send: Tensor | None, receive_nbytes: Mapping[int, int]) -> dict[int, Tensor]:
        """Send this to each of the others, and receive so many bytes from those ranks."""
        received = {peer: torch.empty(nbytes, dtype=torch.uint8) for peer, nbytes in receive_nbytes.items()}
        ranks = range(self._transport.world_size)
        sends = [send if peer in self._others else None for peer in ranks]
        receives = [received.get(peer) for peer in ranks]
        self._transport.exchange(sends, receives, tag=next(self._transport.collectives.numbers)).wait()
        return received


def _packed(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _unpacked(message: Tensor) -> str:
    return bytes(message.numpy()).decode()


def _length(message: Tensor) -> Tensor:
    return torch.tensor([len(message)]).view(torch.uint8)


def _lengths(received: Mapping[int, Tensor]) -> dict[int, int]:
    return {peer: int(length.view(torch.int64)) for peer, length in received.items()}
