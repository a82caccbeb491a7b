"""`narrowcast inspect`: a plan at a glance."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from narrowcast.cli.options import OUTPUT, Overwrite, option
from narrowcast.cli.tables import screen, table
from narrowcast.codecs import Codec, FeatureCodec, TransformCodec
from narrowcast.errors import InvalidInputError
from narrowcast.evaluation import drawings
from narrowcast.files import check_writable, write_new
from narrowcast.plan import Plan
from narrowcast.plan.plan import spelling
from narrowcast.plan.summary import bits_by_site, codec_name, doubts, feedback_in_words, short_name, span, with_ranges

# By hop: its title, and what the expected error is of: an algorithm, or a value that is coded once.
HOPS = (
    ("Values of the ranks (hop 0)", ("one_shot", "once")),
    ("Sums, where they travel again (hop 1)", ("two_shot",)),
    ("Sums of nodes (hop 2)", ("hierarchical",)),
)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A file that calibrate wrote.")],
    plot: Annotated[Path | None, option(OUTPUT, "FILE", "Draw each site's ranges into this PNG file.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show a plan: what was tuned, sites, codecs, bits, outliers, scales and expected errors at a glance."""
    if plot is not None:
        check_writable(plot, overwrite=overwrite)
    plan = Plan.load(path)
    console = screen()
    console.print(f"[bold]{escape(str(path))}[/]  {plan.split}  fingerprint {plan.fingerprint[:16]}")
    console.print(f"model: {_listed(plan.model.config)}", markup=False)
    calibration = {**plan.calibration, "codec": spelling(plan.calibration.get("codec", "of its sites"))}
    calibration.pop("ruled_by_few", None)  # told of below
    console.print(f"calibration: {_listed(calibration)}", markup=False)
    if plan.groups:
        console.print(f"nodes: {', '.join(str(list(group)) for group in plan.groups)}", highlight=False)
    for line in (*_decisions(plan), *feedback_in_words(plan), *(f"warning: {doubt}" for doubt in doubts(plan))):
        console.print(line, markup=False)
    for hop in range(max((len(site.codecs) for site in plan.sites.values()), default=0)):
        console.print(_table(plan, hop))
        console.print(_together(plan, hop))
    if plot is not None:
        _draw(plan, plot, overwrite)
        console.print(f"ranges drawn into {plot}", markup=False)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _draw(plan: Plan, plot: Path, overwrite: bool) -> None:
    if not (sites := with_ranges(plan)):
        raise InvalidInputError(
            "--plot",
            expected="a plan with calibrated ranges, such as int4-feature's",
            found=f"codecs {', '.join(sorted({codec_name(site.codecs[0]) for site in plan.sites.values()}))}",
            remedy="Inspect it without --plot.",
        )
    drawn = io.BytesIO()
    drawings.ranges(sites, str(plan.split)).savefig(drawn, dpi=120, format="png")
    write_new(plot, drawn.getvalue(), overwrite=overwrite)


def _decisions(plan: Plan) -> Iterator[str]:
    """The way that sums take, by their number of tokens."""
    decisions = plan.decisions
    if not decisions.coded:
        yield "not tuned: every sum is coded, whatever its size"
    for what, tables in (("sums", decisions.coded), ("sums that are not coded", decisions.plain)):
        for num_features, thresholds in tables.items():
            ways = ", ".join(f"{choice} from {num_tokens} tokens on" for num_tokens, choice in thresholds)
            yield f"tuned over {decisions.transport}, {what} of {num_features} features: {ways}"
    for num_features, waits in decisions.waits.items():
        each = ", ".join(f"{1e6 * wait_s:.0f} us at {num_tokens} tokens" for num_tokens, wait_s in waits)
        yield f"waited in a sum of {num_features} features: {each}; {decisions.weights_gbps:.1f} GB/s of weights read"


def _table(plan: Plan, hop: int) -> Table:
    """A row for each site that has this hop. `scale` is the median over ranks and features."""
    (title, errors), bits = HOPS[hop], bits_by_site(plan)
    alike = len({site.kind for site in plan.sites.values()}) == 1
    rows = []
    for name, site in plan.sites.items():
        if hop < len(site.codecs):
            codec = site.codecs[hop]
            what = short_name(name), "" if alike else site.kind, codec_name(codec), *_components(codec)
            error = next((f"{site.error[each]:.3f}" for each in errors if each in site.error), "")
            rows.append((*what, f"{bits[name][hop]:.4f}", *_scales(codec), error))
    columns = "site", "kind", "codec", "axes", "components", "bits", "outliers", "scale", "error"
    shown = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    words, figures = ([columns[place] for place in shown if (place < 4) == of_words] for of_words in (True, False))
    found = table(f"{title}: scales, and the relative RMS error of {' or '.join(errors)}", words, figures)
    for row in rows:
        found.add_row(*(row[place] for place in shown))
    return found


def _together(plan: Plan, hop: int) -> str:
    """A line on all sites of a hop: bits and expected errors, with the site that has the largest."""
    _, errors = HOPS[hop]
    bits = bits_by_site(plan)
    here = {name: site for name, site in plan.sites.items() if hop < len(site.codecs)}
    each = [bits[name][hop] for name in here]
    line = f"{len(here)} sites: {sum(each) / len(each):.4f} bits a value on average ({span(each, '{:.4f}')})"
    error = {name: site.error[way] for name, site in here.items() for way in errors if way in site.error}
    if error:
        worst = max(error, key=error.__getitem__)
        line += f"; errors {span(list(error.values()), '{:.3f}')}, the largest at {short_name(worst)}"
    return f"{line}\n"


def _components(codec: Codec) -> tuple[str, str]:
    """Along whose axes how many components travel; nothing where features do."""
    return (codec.axes, str(codec.num_components)) if isinstance(codec, TransformCodec) else ("", "")


def _scales(codec: Codec) -> tuple[str, str]:
    """Number of outliers, and the median scale."""
    if not isinstance(codec, FeatureCodec):
        return "", ""
    return str(len(codec.outliers)), f"{codec.scale.float().median():.2g}"
