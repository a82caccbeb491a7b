"""Pictures of a plan and of what it does to a model's answers, as matplotlib figures for whoever saves them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from narrowcast.codecs import FeatureCodec
from narrowcast.errors import MissingDependencyError
from narrowcast.plan.summary import short_name
from narrowcast.scores import Items, Score

COLOURS = "#2563eb", "#f59e0b", "#10b981"
SMALLEST_KL = 1e-9  # nats: less is rounding
MARKED = 50, 90, 99, 99.9


@dataclass
class Panel:
    """One figure of many sites: `series` by label, each of them numbers by site, which `form` writes.

    `spread`: the items by site that such a number is the mean of, where its interval is known.
    """

    title: str
    form: str
    series: Mapping[str, Mapping[str, float]]
    spread: Mapping[str, Items] = field(default_factory=dict)


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


def by_site(names: Sequence[str], panels: Sequence[Panel]) -> Any:
    """A row for each of the sites `names`, the panels beside each other."""
    figure, all_axes = _figure(1.7 + 1.9 * len(panels), 1.2 + 0.2 * len(names), len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        for index, (label, values) in enumerate(panel.series.items()):
            colour, size = COLOURS[index % len(COLOURS)], 7 if index == 0 else 4
            places = [names.index(name) for name in values]
            axes.plot(list(values.values()), places, "o", color=colour, markersize=size, alpha=0.85, label=label)
        for name, items in panel.spread.items():
            axes.plot(items.interval() or [items.mean] * 2, [names.index(name)] * 2, color=COLOURS[0], linewidth=1)
        axes.set_title(panel.title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [""] * len(names))
        if len(panel.series) > 1:
            below = 0.5, -1.5 / len(names)
            axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=below)
    all_axes[0].set_xlim(left=0)
    all_axes[0].set_yticks(range(len(names)), list(map(short_name, names)), fontsize=8)
    return figure


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
