"""`narrowcast plan`: looking into a plan."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from narrowcast.codecs import Codec, FeatureCodec
from narrowcast.errors import MissingDependencyError
from narrowcast.plan import Plan, check_writable

app = typer.Typer(help="Look into plans.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Look into plans."""


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A file that calibrate wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the ranges of each site into this PNG file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the PNG file if it exists.")] = False,
) -> None:
    """Show a plan: sites, codecs, bits, outliers, scales and expected errors at a glance."""
    if plot is not None:
        check_writable(plot, overwrite=overwrite)
    plan = Plan.load(path)
    console = Console()
    console.print(f"[bold]{path}[/]  tp_size {plan.tp_size}  fingerprint {plan.fingerprint[:16]}")
    console.print("model: " + ", ".join(f"{key} {value}" for key, value in plan.model.config.items()))
    console.print("calibration: " + ", ".join(f"{key} {value}" for key, value in plan.calibration.items()))
    console.print(_table(plan))
    if plot is not None:
        draw_ranges(plan, plot)
        console.print(f"ranges drawn into {plot}")


def _table(plan: Plan) -> Table:
    algorithms = sorted({algorithm for site in plan.sites.values() for algorithm in site.error})
    errors = [f"error, {algorithm}" for algorithm in algorithms]
    table = Table("site", "stage", "codec", "bits a value", "outliers", "scale: min, median, max", *errors)
    for name, site in plan.sites.items():
        for stage, codec in enumerate(site.codecs):
            error = [f"{site.error[algorithm]:.4f}" for algorithm in algorithms] if stage == 0 else [""] * len(errors)
            table.add_row(name if stage == 0 else "", str(stage), codec.id, *_details(codec), *error)
    table.caption = "stage 0: partial sums; 1: the sum, when it travels again. error: relative RMS of the coded sum"
    return table


def _details(codec: Codec) -> tuple[str, str, str]:
    """Bits a value, outliers, scales."""
    if not isinstance(codec, FeatureCodec):
        return f"{8 * codec.row_nbytes(1):.4f}", "", ""
    num_features, scale = codec.scale.shape[1], codec.scale.float()
    some = ", ".join(map(str, codec.outliers.tolist()[:6])) + (", ..." if len(codec.outliers) > 6 else "")
    return (
        f"{8 * codec.row_nbytes(num_features) / num_features:.4f}",
        f"{len(codec.outliers)}: {some}" if len(codec.outliers) else "none",
        f"{scale.min():.2g}, {scale.median():.2g}, {scale.max():.2g}",
    )


def draw_ranges(plan: Plan, path: Path) -> None:
    """One column a site: the spread of its features' ranges at stage 0, outliers as dots."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib", "plot") from error
    sites = {name: site.codecs[0] for name, site in plan.sites.items() if isinstance(site.codecs[0], FeatureCodec)}
    figure = Figure(figsize=(max(6, 1.5 + 0.3 * len(sites)), 5), layout="constrained")
    axes = figure.subplots()
    for place, codec in enumerate(sites.values()):
        reach_RE = codec.scale.float() * (2 ** (codec.num_bits - 1) - 1)
        reach_E = reach_RE.mean(dim=0)
        low, quarter, median, three, high = reach_E.quantile(reach_E.new_tensor([0, 0.25, 0.5, 0.75, 1])).tolist()
        axes.plot([place] * 2, [low, high], color="tab:blue", linewidth=1, alpha=0.5)
        axes.plot([place] * 2, [quarter, three], color="tab:blue", linewidth=6, solid_capstyle="butt")
        axes.plot(place, median, "_", color="white", markersize=6)
        axes.plot([place] * len(codec.outliers), reach_E[codec.outliers].tolist(), ".", color="tab:red")
    axes.set_yscale("log")
    axes.set_xticks(range(len(sites)), list(sites), rotation=90, fontsize=7)
    axes.set_ylabel("range of a feature's partial sums\n(largest magnitude, mean over ranks)")
    axes.set_title(f"tp_size {plan.tp_size}: quartiles and extremes over features; outliers sent in BF16 in red")
    figure.savefig(path, dpi=120)
