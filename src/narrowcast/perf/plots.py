"""Pictures of what was measured: rows of `bench codec`, `collective` and `model` in, a PNG file out."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from narrowcast.errors import MissingDependencyError
from narrowcast.perf.codec import OPS
from narrowcast.perf.sizes import written

Rows = Sequence[Mapping[str, Any]]
NO_LINK = "loopback"
YARDSTICKS = "native", "raw"
STYLES = "-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1))


def check_possible() -> None:
    """MissingDependencyError unless pictures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib", "plot") from error


def draw_codecs(rows: Rows, path: Path) -> None:
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
    figure.savefig(path, dpi=120, format="png")


def draw_collectives(rows: Rows, path: Path) -> None:
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
        axes.set_title(f"{link or NO_LINK}, {world_size} ranks", fontsize=9)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("median, us (dotted: the link alone)")
    handles = {label: line for axes in all_axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=120, format="png")


def draw_models(rows: Rows, path: Path) -> None:
    """Bars of the time to the first token, and of that for each one after it, by link and codec."""
    links, ways = _distinct(rows, "link"), list(dict.fromkeys((row["codec"], row["transport"]) for row in rows))
    figure, all_axes = _figure(2)
    for axes, what in zip(all_axes, ("ttft_ms", "decode_ms_per_token"), strict=True):
        for place, way in enumerate(ways):
            values = [row[what] for row in rows if (row["codec"], row["transport"]) == way]
            places = [index + (place - (len(ways) - 1) / 2) * 0.8 / len(ways) for index in range(len(links))]
            axes.bar(places, values, width=0.8 / len(ways), label=", ".join(way))
        axes.set_xticks(range(len(links)), [link or NO_LINK for link in links], fontsize=8)
        axes.set_ylabel(what.replace("_", " "))
    all_axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


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


def _figure(num_panels: int, *, width: float = 4.6, height: float = 4.2) -> tuple[Any, Sequence[Any]]:
    check_possible()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    return figure, figure.subplots(1, num_panels, sharey=False, squeeze=False)[0]
