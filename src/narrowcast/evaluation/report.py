"""A page about a plan's quality: one HTML file with its pictures in it, and nothing from elsewhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from string import Template
from typing import Any

from narrowcast.evaluation import drawings
from narrowcast.evaluation.drawings import Panel
from narrowcast.evaluation.evaluation import Evaluation
from narrowcast.files import HTML_MARK, versions
from narrowcast.plan.summary import bits_by_site, codec_name, feedback_in_words, short_name, with_ranges
from narrowcast.scores.verdict import in_words

HOPS = "sent first", "sum sent again", "sum of nodes"
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">$mark
<meta name="viewport" content="width=device-width"><title>$title: quality</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem } p, summary { color: #6b7280; margin: .2rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #f3f4f6; vertical-align: top }
td { overflow-wrap: anywhere } figure { margin: .6rem 0; overflow-x: auto } summary { cursor: pointer }
</style></head>
<body>
<h1>$title</h1>
$sections
</body></html>
""")


def page(found: Evaluation, name: str, about: Mapping[str, str]) -> str:
    """The page of the plan called `name`: what was scored, figures with intervals, tokens, and sites.

    `about`: "model", and what else to say of what was scored.
    """
    intervals = "95 % confidence intervals over sequences; docs/quality.md says what each figure is."
    tokens = "How far single tokens are off: few are far, and the mean does not show them."
    sections = [
        _section("Figures", intervals, _table(("figure", "value", "uncompressed", "interval"), found.figures())),
        _section("What was scored", "", _table((), _subject(found, about))),
        _section("KL by token", tokens, _picture(drawings.kl_of_tokens(found.score), "KL by percentile of tokens")),
        _section("By site", _about_sites(found), _by_site(found)),
    ]
    if codecs := with_ranges(found.plan):
        picture = _picture(drawings.ranges(codecs, str(found.plan.split)), "ranges of features by site")
        sections.append(_section("Ranges of features", "What the scales were calibrated from.", picture))
    return PAGE.substitute(mark=HTML_MARK, title=escape(name), sections="\n".join(sections))


def _subject(found: Evaluation, about: Mapping[str, str]) -> list[tuple[str, str]]:
    plan, asked, bits = found.plan, found.conditions, found.report.bits_per_value
    sent = "nothing coded" if bits is None else f"{bits:.4g} bits a value"
    return [
        *about.items(),
        ("fingerprint of the plan", plan.fingerprint[:16]),
        ("calibration", ", ".join(f"{key} {value}" for key, value in plan.calibration.items())),
        ("split", str(plan.split)),
        ("sent", f"{sent}, {found.report.wire_bytes_per_token:.0f} bytes a token"),
        ("clipped", f"{found.report.num_saturated} values"),
        ("algorithm", f"{asked['algorithm']}, {'on real ranks' if found.real else 'simulated in one process'}"),
        ("verdict", in_words(found.score.kl_nats)),
        ("depth feedback", "; ".join(feedback_in_words(plan)) if found.feedback else "turned off"),
        ("reference", f"the uncompressed model, {found.reference}"),
        ("sequences", f"{asked['num_samples']} of {asked['max_seq_len']} tokens at most"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items() if version)),
        ("date", f"{date.today()}"),
    ]


def _by_site(found: Evaluation) -> str:
    """The same figures as a picture and as a table."""
    names, panels = list(found.plan.sites), _panels(found)
    columns, rows = ["site", "kind", "codec"], []
    columns += [f"{panel.title} {label}".strip() for panel in panels for label in panel.series]
    for name, site in found.plan.sites.items():
        figures = [(panel.form, values.get(name)) for panel in panels for values in panel.series.values()]
        cells = ("" if value is None else form.format(value) for form, value in figures)
        rows.append((short_name(name), site.kind, codec_name(site.codecs[0]), *cells))
    picture = _picture(drawings.by_site(names, panels), "figures by site")
    return f"{picture}<details><summary>as a table</summary>{_table(columns, rows)}</details>"


def _panels(found: Evaluation) -> list[Panel]:
    """The figures of sites, but for those that are nought everywhere."""
    sites, report, bits = found.plan.sites, found.report, bits_by_site(found.plan)
    algorithms = dict.fromkeys(algorithm for site in sites.values() for algorithm in site.error)
    by_hop = {
        label: {name: values[hop] for name, values in bits.items() if hop < len(values)}
        for hop, label in enumerate(HOPS)
    }
    by_algorithm = {
        algorithm: {name: site.error[algorithm] for name, site in sites.items() if algorithm in site.error}
        for algorithm in algorithms
    }
    added = {each.site: each.added_kl_nats for each in found.sites}
    clipped = {
        name: site.num_saturated / max(site.num_tokens, report.num_tokens, 1)
        for name, site in report.sites.items()
        if name in sites
    }
    panels = [
        Panel("bits a value", "{:.4f}", by_hop),
        Panel("expected error", "{:.4f}", by_algorithm),
        Panel("KL added, nats", "{:.6f}", {"": {name: items.mean for name, items in added.items()}}, added),
        Panel("clipped a token", "{:.2f}", {"": clipped}),
    ]
    for panel in panels:
        panel.series = {label: values for label, values in panel.series.items() if any(values.values())}
    return [panel for panel in panels if panel.series]


def _about_sites(found: Evaluation) -> str:
    if not found.sites:
        return "Bits, and the error that calibration expects. evaluate --sites measures what each site adds to KL."
    number = len(found.sites[0].added_kl_nats.values)
    together = sum(each.added_kl_nats.mean for each in found.sites)
    return (
        f"KL that each site adds where it alone is coded, over {number} sequences; together {together:.5f} nats, of "
        f"all sites at once {found.score.kl_nats:.5f} over the whole text."
    )


def _section(title: str, about: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{escape(about)}</p>{content}</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _picture(figure: Any, what: str) -> str:
    """As an image of its own within the page: names in one picture do not meet those in another."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img alt="{escape(what)}" src="data:image/svg+xml;base64,{data}"></figure>'
