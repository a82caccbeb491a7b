"""The examination that all ranks take part in, of which each has the same report in the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import socket
from typing import Any

from narrowcast.preflight import ways
from narrowcast.preflight.card import Card
from narrowcast.preflight.roll import Roll
from narrowcast.preflight.ways import Pair
from narrowcast.progress import Progress, tell
from narrowcast.transport.address import interface_of, listen, mtu_of
from narrowcast.transport.handshake import Credentials, Meeting, drawn
from narrowcast.transport.tcp import mesh_of

MEET_S = 5.0  # that who accepts connections may take to shake hands


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank listens for the others. `mtu`: bytes of the interface's largest packet."""

    interface: str
    address: str
    port: int
    mtu: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found out, by rank.

    `hosts`: as they were given; () under torchrun. `store`: where they meet. `missing`: by what they did not come for.
    `unreached`: by rank, whom it does not reach and why; `unmet`: by rank, who accepted its connection and is silent.
    """

    hosts: tuple[str, ...]
    store: str
    timeout_s: float
    missing: dict[int, str]
    cards: dict[int, Card]
    places: dict[int, Place]
    unreached: dict[int, dict[int, str]]
    unmet: dict[int, list[int]]
    pairs: list[Pair]

    @property
    def clocks_s(self) -> dict[int, float]:
        """Seconds by which the clocks of ranks are ahead of rank 0's, of those that have met it."""
        return {0: 0.0} | {pair.high: pair.clock_s for pair in self.pairs if pair.low == 0 and pair.clock_s is not None}

    def to_json(self) -> dict[str, Any]:
        """Ranks, and pairs, as JSON values."""
        return {
            "ranks": [self._rank(rank, card) for rank, card in self.cards.items()],
            "pairs": [asdict(pair) for pair in self.pairs],
            "missing": self.missing,
        }

    def _rank(self, rank: int, card: Card) -> dict[str, Any]:
        told = {name: value for name, value in card.to_json().items() if name not in ("way", "machine")}
        place = asdict(self.places[rank]) if rank in self.places else {}
        place.pop("port", None)
        return {"rank": rank, **told, **place, "clock_s": self.clocks_s.get(rank)}


def examined(roll: Roll, *, plan: Path | None = None, model: str | None = None) -> Report:
    """The report on the ranks of `roll` and the ways between them, after some seconds.

    `plan`, `model`: which the ranks should find alike.
    """
    own = Card.this(roll.hosts, plan, model).to_json()
    cards = {rank: Card.of(each) for rank, each in roll.call("telling of themselves", own).items()}
    with _listening(cards, roll.rank) as (listener, place):
        said = roll.call("listening", {"place": place and asdict(place), **(drawn() if roll.rank == 0 else {})})
        places = {rank: Place(**each["place"]) for rank, each in said.items() if each["place"]}
        addresses = {rank: (each.address, each.port) for rank, each in places.items()}
        tell(Progress("trying who reaches whom"))
        tried = roll.call("reaching each other", ways.unreached(roll.rank, addresses), within_s=ways.REACH_S)
        unreached = {rank: {int(peer): why for peer, why in each.items()} for rank, each in tried.items()}
        able = [rank for rank in unreached if rank in places and cards[rank].compiled]
        peers = {peer: addresses[peer] for peer in able if roll.rank in able and _leads(unreached, roll.rank, peer)}
        met: dict[int, socket] = {}
        if listener is not None and peers:
            met = Meeting(Credentials.of(said[0], roll.rank), listener, peers).meet(MEET_S)
    tell(Progress("measuring latencies and rates"))
    machines = [cards[rank].machine if rank in cards else "" for rank in range(roll.world_size)]
    pairs = ways.measured(mesh_of(met, machines), roll.rank, list(met), able) if met else []
    found = {"pairs": [asdict(pair) for pair in pairs], "unmet": [peer for peer in peers if peer not in met]}
    told = roll.call("measuring", found, within_s=MEET_S + ways.longest_s(len(able)))
    return Report(
        hosts=tuple(roll.hosts),
        store=roll.store,
        timeout_s=roll.timeout_s,
        missing=roll.missing,
        cards=cards,
        places=places,
        unreached=unreached,
        unmet={rank: each["unmet"] for rank, each in told.items()},
        pairs=sorted(Pair(**pair) for each in told.values() for pair in each["pairs"]),
    )


def _leads(unreached: dict[int, dict[int, str]], rank: int, peer: int) -> bool:
    """True where the two can connect: the higher one dials, as in the TCP transport."""
    return peer != rank and min(rank, peer) not in unreached[max(rank, peer)]


@contextmanager
def _listening(cards: dict[int, Card], rank: int) -> Iterator[tuple[socket | None, Place | None]]:
    """A listener of this rank where a TCP transport of these ranks would have it; None if it takes no interface."""
    own = cards[rank].way
    if own.refusal is not None:
        yield None, None
        return
    address = own.binds([card.way for card in cards.values()])
    with listen(address) as listener:
        interface, port = interface_of(address), listener.getsockname()[1]
        yield listener, Place(interface=interface, address=address, port=port, mtu=mtu_of(interface))
