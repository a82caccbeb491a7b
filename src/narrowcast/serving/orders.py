"""The next step of all ranks, as the first one orders it: so all run the same requests with the same tokens."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from narrowcast.engines import Pages
from narrowcast.transport import Transport

_LENGTH_NBYTES = 8


@dataclass(frozen=True, kw_only=True)
class Order:
    """One step. `tokens`: for the requests that the last step named. `scored`: the next tokens of the text that is
    scored, of which it `begins` with these. `ends`: there is no step any more.
    """

    tokens: Sequence[int] = ()
    removed: Sequence[str] = ()
    added: Sequence[tuple[str, Sequence[int]]] = ()
    scored: Sequence[int] = ()
    begins: bool = False
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
    """Orders from the first rank to the others over `transport`, which names a rank that is lost.

    Each order is preceded by its length, and that by a sign of life from those who are to carry it out.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.leads = transport.rank == 0

    def give(self, order: Order) -> None:
        """Tell the others, all of whom are there; PeerLostError names one who is not."""
        message = torch.frombuffer(bytearray(json.dumps(asdict(order)).encode()), dtype=torch.uint8)
        self._exchange(torch.tensor([len(message)]).view(torch.uint8), torch.empty(_LENGTH_NBYTES, dtype=torch.uint8))
        self._exchange(message, None)

    def receive(self) -> Order:
        """The next order; PeerLostError where the first rank is lost."""
        length = torch.empty(_LENGTH_NBYTES, dtype=torch.uint8)
        self._exchange(torch.zeros_like(length), length)
        message = torch.empty(int(length.view(torch.int64)), dtype=torch.uint8)
        self._exchange(None, message)
        return Order(**json.loads(bytes(message.numpy())))

    def _exchange(self, send: Tensor | None, receive: Tensor | None) -> None:
        """Between the first rank and each other one; whatever the first one receives is the same."""
        peers = range(self._transport.world_size)
        if self.leads:
            sends = [send if peer else None for peer in peers]
            receives = [None if receive is None or not peer else torch.empty_like(receive) for peer in peers]
        else:
            sends, receives = ([None if peer else each for peer in peers] for each in (send, receive))
        self._transport.exchange(sends, receives, tag=next(self._transport.collectives.numbers)).wait()
