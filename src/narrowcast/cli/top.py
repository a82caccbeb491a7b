"""`narrowcast monitor top`: a server's figures as they are now, in 80 columns."""

from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from narrowcast.cli.tables import PAGE
from narrowcast.monitoring.alerts import (
    DRIFT_FACTOR,
    ENOUGH,
    ERROR_FACTOR,
    MORE_BITS,
    MOST_CLIPPED,
    MOST_GUARDED,
    VISIBLE,
)
from narrowcast.monitoring.figures import Figures
from narrowcast.monitoring.heat import beyond, rows
from narrowcast.plan.summary import short_name

LABEL = 9  # columns
UNKNOWN = "not told by this server"
# Errors over the plan's: what a cell shows up to a bound, and its style.
LEVELS = [(1.25, ".", "green"), (DRIFT_FACTOR, "-", "green"), (ERROR_FACTOR, "+", "yellow")]
ABOVE, LOST, UNSAMPLED = ("#", "bold red"), ("!", "bold white on red"), (" ", "")


def picture(figures: Figures, url: str, *, silent: str = "") -> Group:
    """All of it; `silent`: since when, and why, the server does not answer any more."""
    head = Text(f"narrowcast  {url}", "bold")
    lines = [
        head,
        _about(figures),
        Text(),
        *_lines(figures),
        Text(),
        *_remarks(figures, silent),
        Text(),
        *_heat(figures),
    ]
    for line in lines:
        line.truncate(PAGE, overflow="ellipsis")
    return Group(*lines)


def _about(figures: Figures) -> Text:
    about = figures.about
    plan = f"plan {about['plan']}" if about.get("plan") else "no plan"
    ranks = f"{figures.num_heard} of {figures.num_ranks} ranks"
    words = ", ".join(filter(None, (ranks, plan, about.get("transport", ""), about.get("kernels", ""))))
    return Text(", ".join(filter(None, (_end(about["model"], PAGE - len(words) - 2), words))), "dim")


def _end(path: str, most: int) -> str:
    """The end of a path, which says most, in no more characters than that."""
    return path if len(path) <= most else f"…{path[len(path) - most + 1 :]}"


def _lines(figures: Figures) -> Iterator[Text]:
    yield _line("tokens", _tokens(figures))
    running, waiting = figures.running, figures.waiting
    known = running is not None and waiting is not None
    yield _line("requests", f"{running:.0f} running, {waiting:.0f} waiting" if known else UNKNOWN)
    yield _line("latency", _latency(figures))
    yield _line("bits", _bits(figures))
    yield _line("bytes", _bytes_sent(figures))
    yield _line("error", _error(figures))


def _line(label: str, words: str) -> Text:
    return Text.assemble((label.ljust(LABEL), "dim"), words)


def _tokens(figures: Figures) -> str:
    generated, read = figures.generated_per_s, figures.read_per_s
    if generated is not None and read is not None:
        return f"{generated:,.1f} generated a second, {read:,.1f} read"
    processed = figures.processed_per_s
    return UNKNOWN if processed is None else f"{processed:,.1f} processed a second; generated: {UNKNOWN}"


def _latency(figures: Figures) -> str:
    if not figures.times_told:
        return UNKNOWN
    first, between = ("none yet" if each is None else _seconds(each) for each in (figures.ttft_s, figures.gap_s))
    return f"first token {first}, between tokens {between}"


def _bits(figures: Figures) -> str:
    now = "none sent yet" if figures.bits is None else f"{figures.bits:.2f} a value now"
    return now + ("" if figures.planned_bits is None else f", {figures.planned_bits:.2f} planned")


def _bytes_sent(figures: Figures) -> str:
    if not figures.sent_bytes:
        return "none sent yet"
    saved, times = figures.plain_bytes - figures.sent_bytes, figures.plain_bytes / figures.sent_bytes
    rate = "" if figures.sent_per_s is None else f", {_size(figures.sent_per_s)} a second"
    return f"{_size(figures.sent_bytes)} sent, {_size(saved)} saved ({times:.1f} times fewer){rate}"


def _error(figures: Figures) -> str:
    ratios = figures.error_ratios
    if not ratios:
        return "no sum was sampled yet" if figures.sites else UNKNOWN
    worst = max(ratios, key=ratios.__getitem__)
    mean = sum(ratios.values()) / len(ratios)
    return f"{mean:.2f} of the plan's on average, {ratios[worst]:.2f} at {short_name(worst)}"


def _remarks(figures: Figures, silent: str) -> Iterator[Text]:
    found = [*_wrong(figures)]
    if silent:
        yield Text(f"! {silent}", "bold red")
    for remark in found:
        yield Text(f"! {remark}", "bold red")
    if not found and not silent:
        yield Text("nothing to remark", "green")


def _wrong(figures: Figures) -> Iterator[str]:
    """Remarks on what would raise an alert, were it to last."""
    if figures.num_heard < figures.num_ranks:
        yield f"{figures.num_ranks - figures.num_heard} of {figures.num_ranks} ranks are gone"
    if lost := figures.non_finite:
        yield f"NaN or infinite {_at(sorted(lost, key=lost.__getitem__, reverse=True))}, since the start"
    above = [site for site in beyond(figures.error_ratios, ERROR_FACTOR) if figures.errors[site] > VISIBLE]
    if above := [site for site in above if figures.num_sampled.get(site, 0.0) >= ENOUGH]:
        yield f"error {figures.error_ratios[above[0]]:.1f} times the plan's {_at(above)}"
    if clipped := beyond(figures.clipped, MOST_CLIPPED):
        yield f"{figures.clipped[clipped[0]]:.1%} of the values are clipped {_at(clipped)}"
    if guarded := beyond(figures.guarded, MOST_GUARDED):
        yield f"{figures.guarded[guarded[0]]:.1%} of the tokens are far out of range {_at(guarded)}"
    if figures.bits and figures.planned_bits and figures.bits > MORE_BITS * figures.planned_bits:
        yield "values take more bits than planned"


def _at(sites: list[str]) -> str:
    """The first one by name."""
    return f"at {short_name(sites[0])}" + (f" and {len(sites) - 1} more" if len(sites) > 1 else "")


def _heat(figures: Figures) -> Iterator[Text]:
    legend = Text.assemble(("by layer, over the plan's:  ", "dim"))
    for bound, sign, style in LEVELS:
        legend.append(sign, style).append(f" to {bound:g}  ", "dim")
    legend.append(ABOVE[0], ABOVE[1]).append(" above  ", "dim").append(LOST[0], LOST[1]).append(" not finite", "dim")
    kinds = list(rows(figures.sites))
    width = min(max((len(kind) for kind, _, _ in kinds), default=0), PAGE - 60)
    if kinds:
        yield legend
    for kind, first, sites in kinds:
        line = Text.assemble((f"{kind[-width:].ljust(width)} {'' if first is None else first:>4}  ", "dim"))
        for site in sites:
            line.append(*_cell(figures, site))
        yield line


def _cell(figures: Figures, site: str | None) -> tuple[str, str]:
    if site is not None and site in figures.non_finite:
        return LOST
    ratio = figures.error_ratios.get(site) if site is not None else None
    if ratio is None:
        return UNSAMPLED
    return next(((sign, style) for bound, sign, style in LEVELS if ratio <= bound), ABOVE)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"
