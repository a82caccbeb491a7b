"""`narrowcast doctor` of several ranks as it is shown: a table that fits 80 columns, and a line for each problem."""

from collections.abc import Sequence

from rich.markup import escape

from narrowcast.cli.tables import screen, table
from narrowcast.preflight import Problem, Report
from narrowcast.preflight.card import COMPARED

NUM_PEERS = 4  # of a rank that are shown, the slowest
UNITS = ("G", 1e9), ("M", 1e6), ("k", 1e3)


def show(report: Report, problems: Sequence[Problem]) -> None:
    """Print the report."""
    words, figures = ("host", "binds", "kernels"), ("MTU", "clock", "threads", "to", "ms", "bit/s")
    found = table("narrowcast doctor", ("rank", *words), figures)
    for rank, card in report.cards.items():
        place, ahead_s = report.places.get(rank), report.clocks_s.get(rank)
        ways = zip(*_slowest(report, rank), strict=True)
        found.add_row(
            f"{rank}",
            escape(card.host),
            f"{place.address} {place.interface}" if place else "nothing",
            card.kernels,
            f"{place.mtu}" if place else "",
            "?" if ahead_s is None else f"{ahead_s:+.2f}",
            f"{card.threads} of {card.cores}",
            *("\n".join(cells) for cells in ways),
        )
    screen().print(found)
    cards = list(report.cards.values())
    alike = [name for name in COMPARED if all(card.versions[name] == cards[0].versions[name] for card in cards)]
    if alike:
        screen().print(f"on all ranks: {', '.join(f'{name} {cards[0].versions[name]}' for name in alike)}")
    for problem in problems:
        screen().print(f"- {problem}", markup=False)
    if not problems:
        screen().print("no problem found")


def _slowest(report: Report, rank: int) -> list[tuple[str, str, str]]:
    """Cells of a rank's ways to its peers: to whom, milliseconds, bits a second. Without a way counts as slowest."""
    rates = {pair.high: (pair.latency_s, pair.there_bps) for pair in report.pairs if pair.low == rank}
    rates |= {pair.low: (pair.latency_s, pair.back_bps) for pair in report.pairs if pair.high == rank}
    peers = sorted((peer for peer in report.cards if peer != rank), key=lambda peer: rates.get(peer, (0, 0))[1] or 0)
    cells = []
    for peer in sorted(peers[:NUM_PEERS]):
        latency_s, rate_bps = rates.get(peer, (None, None))
        cells.append((f"{peer}", "-" if latency_s is None else f"{1e3 * latency_s:.2g}", _written(rate_bps)))
    return cells or [("", "", "")]


def _written(rate_bps: float | None) -> str:
    if rate_bps is None:
        return "-"
    unit, size = next((each for each in UNITS if rate_bps >= each[1]), ("", 1.0))
    return f"{rate_bps / size:.3g}{unit}"
