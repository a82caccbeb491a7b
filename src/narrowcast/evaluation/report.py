"""A page about a plan's quality: one HTML file with its pictures in it, and nothing from elsewhere."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from html import escape
from typing import Any

from narrowcast.evaluation import drawings
from narrowcast.evaluation.evaluation import FIGURES, Evaluation
from narrowcast.files import HTML_MARK, versions
from narrowcast.plan.summary import bits_by_site, codec_name, with_ranges
from narrowcast.scores import Interval

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p.under { color: #6b7280; margin-top: .2rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.2rem 0 }
.card { border: 1px solid #e5e7eb; border-radius: .5rem; padding: .7rem .9rem }
.card b { display: block; font-size: 1.5rem; font-weight: 600 } .card small { color: #6b7280; display: block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #f3f4f6; vertical-align: top }
th { font-weight: 600; color: #4b5563 } td.number, th.number { text-align: right }
figure { margin: .6rem 0; overflow-x: auto } figcaption { color: #6b7280; font-size: .9rem }
code { font-size: .9em; overflow-wrap: anywhere } summary { cursor: pointer; color: #4b5563 }
"""


def page(found: Evaluation, name: str, about: Mapping[str, str]) -> str:
    """The page of the plan called `name`: what was scored, figures with intervals, tokens, and sites.

    `about`: "model", and what else to say of what was scored.
    """
    plan = found.plan
    body = [
        f"<h1>{escape(name)}</h1>",
        f"<p class=under>What sending {escape(_sent(found))} does to the answers of {escape(about['model'])}</p>",
        _cards(found),
        _section("Figures", _figures(found), "95 % confidence intervals over sequences; docs/quality.md says what "
                 "each figure is."),
        _section("What was scored", _table((), _subject(found, about))),
        _section("KL by token", _picture(drawings.kl_of_tokens(found.score), "KL by percentile of tokens") +
                 _table(("percentile of tokens", "KL, nats"),
                        [(_percentile(name), f"{value:.5f}") for name, value in found.score.kl_percentiles.items()]),
                 "How far single tokens are off: few are far, and the mean does not show them."),
        _section("By site", _by_site(found), _about_sites(found)),
    ]  # fmt: skip
    if codecs := with_ranges(plan):
        picture = _picture(drawings.ranges(codecs, str(plan.split)), "ranges of features by site")
        body.append(_section("Ranges of features", picture, "What the scales were calibrated from."))
    title = escape(f"{name}: quality")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{HTML_MARK}\n'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _sent(found: Evaluation) -> str:
    bits = found.report.bits_per_value
    return "nothing coded" if bits is None else f"{bits:.4g} bits a value"


def _cards(found: Evaluation) -> str:
    cards = []
    for name in ("kl_nats", "top1_agreement", "perplexity_change"):
        what, form = FIGURES[name]
        value, interval = form.format(getattr(found.score, name)), _interval(found.score.intervals[name], form)
        cards.append(f"<div class=card><small>{what}</small><b>{value}</b><small>{interval}</small></div>")
    sent = f"{found.report.wire_bytes_per_token:.0f} bytes a token"
    bits = "none" if found.report.bits_per_value is None else f"{found.report.bits_per_value:.4g}"
    cards.append(
        f"<div class=card><small>sent, bits a value</small><b>{bits}</b><small>{sent}, first rank</small></div>"
    )
    return f"<div class=cards>{''.join(cards)}</div>"


def _figures(found: Evaluation) -> str:
    rows = [
        (what, form.format(getattr(found.score, name)), _interval(found.score.intervals[name], form))
        for name, (what, form) in FIGURES.items()
    ]
    counted = [
        ("tokens scored", str(found.score.num_tokens), ""),
        ("values clipped", str(found.report.num_saturated), ""),
    ]
    return _table(("figure", "value", "interval"), [*rows, *counted])


def _subject(found: Evaluation, about: Mapping[str, str]) -> list[tuple[str, str]]:
    plan, asked = found.plan, found.conditions
    return [
        *about.items(),
        ("fingerprint of the plan", plan.fingerprint[:16]),
        ("calibration", ", ".join(f"{key} {value}" for key, value in plan.calibration.items())),
        ("split", str(plan.split)),
        ("algorithm", f"{asked['algorithm']}, {'on real ranks' if found.real else 'simulated in one process'}"),
        ("reference", f"the uncompressed model, {found.reference}"),
        ("sequences", f"{asked['num_samples']} of {asked['max_seq_len']} tokens at most"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items() if version)),
        ("date", f"{date.today()}"),
    ]


def _by_site(found: Evaluation) -> str:
    plan, bits = found.plan, bits_by_site(found.plan)
    clipped = {
        name: site.num_saturated / max(site.num_tokens, found.report.num_tokens, 1)
        for name, site in found.report.sites.items()
    }
    clipped = {name: clipped.get(name, 0.0) for name in plan.sites}
    added = {each.site: each.added_kl_nats for each in found.sites}
    rows = []
    for name, site in plan.sites.items():
        error = ", ".join(f"{algorithm} {value:.4f}" for algorithm, value in site.error.items())
        kl = f"{added[name].mean:.6f}" if name in added else ""
        codec = codec_name(site.codecs[0])
        rows.append((drawings.short(name), site.kind, codec, f"{bits[name][0]:.4f}", error, kl, f"{clipped[name]:.2f}"))
    columns = "site", "kind", "codec", "bits", "expected error", "KL added, nats", "clipped a token"
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    table = _table([columns[place] for place in kept], [[row[place] for place in kept] for row in rows])
    return (
        _picture(drawings.by_site(plan, bits, found.sites, clipped), "figures by site")
        + f"<details><summary>as a table</summary>{table}</details>"
    )


def _about_sites(found: Evaluation) -> str:
    if not found.sites:
        return "Bits, and the error that calibration expects. evaluate --sites measures what each site adds to KL."
    number = len(found.sites[0].added_kl_nats.values)
    together = sum(each.added_kl_nats.mean for each in found.sites)
    return (
        f"KL that each site adds where it alone is coded, over {number} sequences; together {together:.5f} nats, of "
        f"all sites at once {found.score.kl_nats:.5f} over the whole text."
    )


def _percentile(name: str) -> str:
    return "largest" if name == "100" else f"{name} %"


def _interval(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{form.format(interval.low)} to {form.format(interval.high)}"


def _section(title: str, content: str, about: str = "") -> str:
    return (
        f"<section><h2>{title}</h2>" + (f"<p class=under>{escape(about)}</p>" if about else "") + f"{content}</section>"
    )


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{f'<tr>{head}</tr>' * bool(head)}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _picture(figure: Any, what: str) -> str:
    """As an image of its own within the page: names in one picture do not meet those in another."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img alt="{escape(what)}" src="data:image/svg+xml;base64,{data}"></figure>'
