"""Agreement on codecs: payloads of other ones, where they are as long, would add up to garbage without an error."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives.base import Begin, Exchange, Steps, without
from narrowcast.collectives.pending import Pending
from narrowcast.errors import InvalidInputError
from narrowcast.transport import CARD_NBYTES, Transport

# A card: the digest of codecs, and their names, cut or filled up.
_DIGEST_NBYTES = 32


def agree(codecs: Sequence[Codec], transport: Transport, device: torch.device) -> None:
    """InvalidInputError on every rank unless all pass the same codecs. They compare them when they first use them."""
    digest = digest_of(codecs)
    if transport.world_size == 1 or digest in transport.collectives.agreed:
        return
    own = _card(codecs, digest)
    try:
        cards = Pending(_steps(own.to(device), transport), transport).wait().cpu()
    except InvalidInputError as error:
        raise InvalidInputError(
            f"codecs of rank {transport.rank}, {_named(codecs)}",
            expected="ones that all ranks use for the first time now, as this one does",
            found="that another one uses those that it used before",
            remedy=str(error),
        ) from error
    for peer, card in enumerate(cards):
        _check(card, peer, own, transport.rank)
    transport.collectives.agreed.add(digest)


def announced(steps: Steps, codec: Codec, transport: Transport, device: torch.device, pair: tuple[int, int]) -> Steps:
    """The `steps` of a transfer between a `pair`, source first, which say beforehand what codec it is, if it is new.

    The receiving end raises InvalidInputError for another one than its own; the sending end hears of nothing.
    """
    digest, known = digest_of([codec]), transport.collectives.announced[pair]
    if digest in known:
        return steps
    known.add(digest)
    return _announcing(steps, _card([codec], digest), transport, device, pair)


def digest_of(codecs: Sequence[Codec]) -> bytes:
    """SHA-256 of all that makes these codecs."""
    found = hashlib.sha256()
    for codec in codecs:
        config, tensors = codec.state()
        found.update(f"{codec.id} {json.dumps(config)}".encode())
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def _steps(own: Tensor, transport: Transport) -> Steps:
    """Steps of gathering the cards of all ranks."""
    rank, world_size = transport.rank, transport.world_size
    every = own.expand(world_size, -1).contiguous()
    yield Exchange(without([own] * world_size, rank), without(every.unbind(), rank), 0)
    return every


def _announcing(steps: Steps, own: Tensor, transport: Transport, device: torch.device, pair: tuple[int, int]) -> Steps:
    """Both messages are under way from the start: no wait but that of the transfer itself takes it further."""
    (src, dst), rank = pair, transport.rank
    travelling = own.to(device, copy=True)
    sends, recvs = ([travelling if peer == to else None for peer in range(transport.world_size)] for to in (dst, src))
    nothing: list[Tensor | None] = [None] * transport.world_size
    card = yield Begin(Exchange(sends, nothing, 0) if rank == src else Exchange(nothing, recvs, 0))
    exchange = next(steps)
    assert isinstance(exchange, Exchange), "a transfer between two ranks is one exchange"
    payload = yield Begin(exchange)
    yield card
    try:
        _check(travelling.cpu(), src, own, rank)
    except InvalidInputError:
        transport.collectives.announced[pair].discard(bytes(own[:_DIGEST_NBYTES].tolist()))
        raise
    yield payload
    try:
        next(steps)
    except StopIteration as end:
        result: Tensor = end.value
        return result
    raise AssertionError("a transfer between two ranks is one exchange")


def _card(codecs: Sequence[Codec], digest: bytes) -> Tensor:
    room = CARD_NBYTES - _DIGEST_NBYTES
    return torch.frombuffer(bytearray(digest + _named(codecs).encode()[:room].ljust(room)), dtype=torch.uint8)


def _check(card: Tensor, peer: int, own: Tensor, rank: int) -> None:
    """InvalidInputError unless the card of `peer` is that of this `rank`."""
    if torch.equal(card, own):
        return
    mine, theirs = (bytes(each[_DIGEST_NBYTES:].tolist()).decode(errors="replace").rstrip() for each in (own, card))
    raise InvalidInputError(
        f"codec of rank {peer}",
        expected=f"that of rank {rank}, {mine}, with the same tensors",
        found="other tensors" if theirs == mine else theirs,
        remedy="Pass the same codecs on every rank, as a plan file does.",
    )


def _named(codecs: Sequence[Codec]) -> str:
    """Their formats and parameters."""
    return " and ".join(
        f"{codec.id}({', '.join(f'{name}={value}' for name, value in codec.state()[0].items())})" for codec in codecs
    )
