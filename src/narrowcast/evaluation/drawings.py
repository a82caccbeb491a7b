"""Pictures of a plan and of what it does to a model's answers, as matplotlib figures for whoever saves them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from narrowcast.codecs import FeatureCodec
from narrowcast.errors import MissingDependencyError
from narrowcast.evaluation.sites import SiteError
from narrowcast.plan import Plan
from narrowcast.scores import Score

COLOURS = "#2563eb", "#f59e0b", "#10b981"
SMALLEST_KL = 1e-9  # nats: less is rounding
MARKED = 50, 90, 99, 99.9


def check_possible() -> None:
    """MissingDependencyError unless pictures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib", "plot") from error


def ranges(sites: Mapping[str, FeatureCodec], title: str) -> Any:
    """One column a site: the spread of its features' ranges, outliers as dots."""
    figure, (axes,) = _figure(max(6, 1.5 + 0.3 * len(sites)), 5)
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
    axes.set_title(f"quartiles and extremes over features, {title};\noutliers, sent in BF16, in red")
    return figure


def kl_of_tokens(score: Score) -> Any:
    """KL against the share of tokens that do not exceed it, stretched towards the largest."""
    figure, (axes,) = _figure(8, 3.4)
    number = len(score.kl_by_token)
    above = np.geomspace(1, 1 / number, 200)  # share of tokens above
    axes.plot(1 / above, _drawable(np.quantile(score.kl_by_token, 1 - above)), color=COLOURS[0], linewidth=2)
    marked = [each for each in MARKED if number * (100 - each) >= 100]
    values = _drawable(np.percentile(score.kl_by_token, marked))
    axes.plot([100 / (100 - each) for each in marked], values, "o", color=COLOURS[0])
    for each, value in zip(marked, values, strict=True):
        axes.annotate(f"{value:.2g}", (100 / (100 - each), value), (6, -11), textcoords="offset points", fontsize=8)
    axes.axhline(score.kl_nats, color="gray", linewidth=1, linestyle=":")
    axes.annotate("mean", (1, score.kl_nats), (2, 3), textcoords="offset points", fontsize=8, color="gray")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(float(np.quantile(score.kl_by_token, 0.02)), SMALLEST_KL))
    axes.set_xticks([1, *(100 / (100 - each) for each in marked)], ["0 %", *(f"{each:g} %" for each in marked)])
    axes.minorticks_off()
    axes.set_xlabel("tokens that do not exceed it")
    axes.set_ylabel("KL, nats")
    return figure


def by_site(
    plan: Plan, bits: Mapping[str, Sequence[float]], errors: Sequence[SiteError], clipped: Mapping[str, float]
) -> Any:
    """A row a site, a panel a figure: bits by stage, expected error by algorithm, KL that it adds, values clipped."""
    names, wide = list(plan.sites), 3 if errors else 2
    panels = wide + any(clipped.values())
    figure, all_axes = _figure(1.7 + 1.9 * panels, 1.2 + 0.2 * len(names), panels)
    places = dict(zip(names, range(len(names)), strict=True))
    stages = ["sent first", "sum sent again", "sum of nodes"]
    for stage, label in enumerate(stages):
        rows = [(values[stage], places[name]) for name, values in bits.items() if stage < len(values)]
        _dots(all_axes[0], rows, stage, label)
    algorithms = dict.fromkeys(algorithm for site in plan.sites.values() for algorithm in site.error)
    for index, algorithm in enumerate(algorithms):
        rows = [(site.error[algorithm], places[name]) for name, site in plan.sites.items() if algorithm in site.error]
        _dots(all_axes[1], rows, index, algorithm)
    if errors:
        _dots(all_axes[2], [(each.added_kl_nats.mean, places[each.site]) for each in errors], 0, "")
        for each in errors:
            if interval := each.added_kl_nats.interval():
                all_axes[2].plot(interval, [places[each.site]] * 2, color=COLOURS[0], linewidth=1)
        all_axes[2].axvline(0, color="gray", linewidth=0.8)
    if any(clipped.values()):
        _dots(all_axes[-1], [(clipped[name], places[name]) for name in names], 0, "")
    titles = ["bits a value", "relative RMS error\n(calibration)", "KL that it alone adds,\nnats"][:wide]
    for axes, title in zip(all_axes, [*titles, "values clipped,\na token, all ranks"], strict=False):
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.set_ylim(len(names) - 0.5, -0.5)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3 / (0.2 * len(names))))
        axes.set_yticks(range(len(names)), [""] * len(names))
    all_axes[0].set_xlim(left=0)
    all_axes[0].set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    return figure


def short(name: str) -> str:
    """A site's name without what all have."""
    return name.removeprefix("model.").removeprefix("layers.")


def _dots(axes: Any, rows: Sequence[tuple[float, int]], index: int, label: str) -> None:
    if rows:
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*rows, strict=True), "o", color=colour, markersize=4 + 3 * (index == 0), alpha=0.85, label=label)


def _drawable(kl: Any) -> Any:
    return np.maximum(kl, SMALLEST_KL)


def _figure(width: float, height: float, num_panels: int = 1) -> tuple[Any, Sequence[Any]]:
    check_possible()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, all_axes
