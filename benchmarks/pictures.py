"""Pictures of what `narrowcast bench codec` or `bench collective` measured, as they stand in docs/benchmarks.md.

usage: python benchmarks/pictures.py RESULT.json PICTURE.png    (a file that bench wrote, or one of benchmarks/results)
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import reporting
from matplotlib.figure import Figure

from narrowcast.perf.codec import OPS
from narrowcast.perf.sizes import written

Rows = Sequence[Mapping[str, Any]]
YARDSTICKS = "native", "raw"
STYLES = "-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1))


def draw_codecs(rows: Rows) -> Figure:
    """A bar for each operation of each codec, by the fastest kernels; a line where copying the tensor is."""
    codecs = _distinct(rows, "codec")
    figure, (axes,) = _figure(1, width=8, height=1.2 + 0.3 * len(codecs))
    for place, op in enumerate(OPS):
        best = [max(row["gbps"] for row in rows if (row["codec"], row["op"]) == (codec, op)) for codec in codecs]
        places = [index + (place - 1) * 0.27 for index in range(len(codecs))]
        axes.barh(places, best, height=0.27, label=op)
    speeds = sorted(row["memcpy_gbps"] for row in rows)
    axes.axvline(speeds[len(speeds) // 2], color="black", linestyle=":", linewidth=1, label="memcpy")
    axes.set_yticks(range(len(codecs)), codecs, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the tensor, one thread, fastest kernels")
    axes.legend(fontsize=7)
    return figure


def draw_collectives(rows: Rows) -> Figure:
    """Time against size, a panel for each link and number of ranks; dotted, what the link alone takes.

    A colour for each codec, a style for each transport and algorithm.
    """
    panels = list(dict.fromkeys((row["link"], row["world_size"]) for row in rows))
    colours = {codec: f"C{index % 10}" for index, codec in enumerate(_distinct(rows, "codec"))}
    ways = list(dict.fromkeys((row["transport"], row["algorithm"]) for row in rows if row["codec"] not in YARDSTICKS))
    styles = dict(zip(ways, STYLES, strict=False))
    figure, all_axes = _figure(len(panels))
    for axes, (link, world_size) in zip(all_axes, panels, strict=True):
        here = [row for row in rows if (row["link"], row["world_size"]) == (link, world_size)]
        for label, line in _lines(here):
            places, colour = [row["nbytes"] for row in line], colours[line[0]["codec"]]
            style = styles.get((line[0]["transport"], line[0]["algorithm"]), "-")
            times = [row["median_us"] for row in line]
            axes.plot(places, times, marker=".", linestyle=style, color=colour, linewidth=1.2, label=label)
            if link is not None:
                axes.plot(places, [row["limit_us"] for row in line], ":", color=colour, linewidth=0.7)
        sizes = _distinct(here, "nbytes")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [written(each) for each in sizes], fontsize=7)
        axes.set_yscale("log")
        axes.set_xlabel("bytes of the BF16 tensor")
        axes.set_title(f"{link or 'loopback'}, {world_size} ranks", fontsize=9)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("median, us (dotted: the link alone)")
    handles = {label: line for axes in all_axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _lines(rows: Rows) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Rows by what is drawn as one line; of plain sockets, those that carry as much as an uncompressed sum."""
    for transport, codec, algorithm in dict.fromkeys(_case(row) for row in rows):
        line = [row for row in rows if _case(row) == (transport, codec, algorithm)]
        if transport == "socket":
            line = [
                max((row for row in line if row["nbytes"] == nbytes), key=_sent) for nbytes in _distinct(line, "nbytes")
            ]
        yield f"{codec}, {algorithm}, {transport}", line


def _case(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["transport"], row["codec"], row["algorithm"]


def _sent(row: Mapping[str, Any]) -> int:
    return int(row["wire_bytes"])


def _distinct(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _figure(num_panels: int, *, width: float = 4.6, height: float = 4.2) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    return figure, figure.subplots(1, num_panels, sharey=False, squeeze=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    rows = [row for run in reporting.read(arguments.result) for row in run["rows"]]
    draw = draw_codecs if "op" in rows[0] else draw_collectives
    draw(rows).savefig(arguments.picture, dpi=120, format="png")


if __name__ == "__main__":
    main()
