"""The problems of a report: what was found in a sentence, and what to do about it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from narrowcast.preflight.card import COMPARED
from narrowcast.preflight.examination import Report
from narrowcast.preflight.roll import without_loopback
from narrowcast.transport.address import GLOO_INTERFACE, REMEDY, loops

CLOCK_S = 1.0  # from which on logs of several hosts mislead


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that keeps ranks from working together, or as fast as they could."""

    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found[0].upper()}{self.found[1:]}. {self.remedy}"


def problems(report: Report) -> list[Problem]:
    """Those of a report, the gravest first."""
    kinds = (_missing, _addresses, _connections, _packets, _clocks, _software, _files)
    return [problem for kind in kinds for problem in kind(report)]


def _missing(report: Report) -> Iterator[Problem]:
    for rank, doing in sorted(report.missing.items()):
        if rank in report.cards:
            yield Problem(
                found=f"{_named(report, rank)} was lost while {doing}",
                remedy="See what it says there, and start again.",
            )
            continue
        start = f"the same command with --node-rank {rank}" if report.hosts else "torchrun"
        yield Problem(
            found=f"{_named(report, rank)} did not come within {report.timeout_s:g} s",
            remedy=f"Start {start} there; if it runs, let no firewall keep that host from {report.store}, MASTER_PORT.",
        )


def _addresses(report: Report) -> Iterator[Problem]:
    for rank, card in report.cards.items():
        if card.way.refusal is not None:
            yield Problem(found=f"{_named(report, rank)} takes no interface", remedy=card.way.refusal)
    if len({card.way.network for card in report.cards.values()}) == 1:
        return
    for rank, card in report.cards.items():
        for name, address in card.looping.items() if not card.way.given else ():
            yield Problem(
                found=f"{_named(report, rank)}: {name} leads to {address} there, which gloo takes if left alone",
                remedy=f"{without_loopback(name)} Or set {GLOO_INTERFACE} there.",
            )
    for rank, place in report.places.items():
        if loops(place.address):
            yield Problem(
                found=f"{_named(report, rank)} binds {place.address}, which other hosts do not reach", remedy=REMEDY
            )


def _connections(report: Report) -> Iterator[Problem]:
    for rank, reasons in report.unreached.items():
        for peer, reason in reasons.items():
            address = report.places[peer].address
            yield Problem(
                found=f"{_named(report, rank)} does not reach {_named(report, peer)} on {address}: {reason}",
                remedy=f"Let no firewall part these hosts: ranks listen on any free port. Or set {GLOO_INTERFACE} on "
                "both to an interface on a network that they share.",
            )
    for rank, silent in report.unmet.items():
        for peer in silent:
            if peer < rank:
                yield Problem(
                    found=f"{_named(report, peer)} accepted the connection of {_named(report, rank)}, and is silent",
                    remedy="Look for something between them that answers in its place, such as a proxy.",
                )


def _packets(report: Report) -> Iterator[Problem]:
    mtus = {rank: str(place.mtu) for rank, place in report.places.items() if not loops(place.address)}
    smallest = min(mtus.values(), key=int, default="")
    remedy = f"Set one MTU on all interfaces and on what lies between: ip link set dev NAME mtu {smallest}."
    if len(set(mtus.values())) > 1:
        yield Problem(found=f"MTUs differ: {_grouped(mtus)}", remedy=remedy)
    for pair in report.pairs:
        if pair.stalled and pair.latency_s is not None:
            yield Problem(found=f"{pair.stalled} do not arrive, small ones do", remedy=remedy)
        elif pair.stalled:
            yield Problem(
                found=f"nothing arrives between {_named(report, pair.low)} and {_named(report, pair.high)}, which met",
                remedy="See what they say there, and start again.",
            )


def _clocks(report: Report) -> Iterator[Problem]:
    for rank, ahead_s in report.clocks_s.items():
        if abs(ahead_s) > CLOCK_S:
            yield Problem(
                found=f"the clock of {_named(report, rank)} is {abs(ahead_s):.1f} s "
                f"{'ahead of' if ahead_s > 0 else 'behind'} rank 0's",
                remedy="Let the hosts set their clocks by the network: timedatectl set-ntp true.",
            )


def _software(report: Report) -> Iterator[Problem]:
    for package in COMPARED:
        found = {rank: card.versions[package] or "none" for rank, card in report.cards.items()}
        if len(set(found.values())) > 1:
            yield Problem(
                found=f"versions of {package} differ: {_grouped(found)}", remedy="Install the same one on all."
            )
    if lacking := [rank for rank, card in report.cards.items() if not card.compiled]:
        yield Problem(
            found=f"{_ranks(lacking)} without the compiled module: coding takes many times as long, and all send over "
            "torch.distributed",
            remedy="Install a C++ compiler and CMake there (apt install g++ cmake), then narrowcast again.",
        )


def _files(report: Report) -> Iterator[Problem]:
    for rank, card in report.cards.items():
        for refusal in card.refusals:
            yield Problem(found=f"{_named(report, rank)} cannot use what it is given", remedy=refusal)
    plans = {rank: card.plan[:12] for rank, card in report.cards.items() if card.plan}
    if len(set(plans.values())) > 1:
        yield Problem(
            found=f"plans differ: {_grouped(plans)}", remedy="Copy one to all, and compare with narrowcast inspect."
        )
    models = {rank: card.model for rank, card in report.cards.items() if card.model}
    names = {name: None for fields in models.values() for name in fields}
    for name in names:
        values = {rank: str(fields.get(name)) for rank, fields in models.items()}
        if len(set(values.values())) > 1:
            yield Problem(
                found=f"models differ, as in {name}: {_grouped(values)}", remedy="Give all ranks copies of one model."
            )
            break


def _named(report: Report, rank: int) -> str:
    """A rank and its host, as it was given or, under torchrun, as it calls itself."""
    host = report.hosts[rank] if report.hosts else report.cards[rank].host if rank in report.cards else ""
    return f"rank {rank} ({host})" if host else f"rank {rank}"


def _grouped(values: Mapping[int, str]) -> str:
    """Values, each with its ranks."""
    ranks = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    return "; ".join(f"{value} on {_ranks(each)}" for value, each in ranks.items())


def _ranks(ranks: Iterable[int]) -> str:
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
