"""A picture of a trace: what each rank does in the first part of a prompt.

usage: python benchmarks/timeline.py TRACE.json PICTURE.png [--ms N]    (TRACE: narrowcast bench model --timeline)
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {
    "compute": "tab:blue",
    "encode": "tab:orange",
    "recode": "tab:red",
    "decode": "tab:green",
    "exchange": "tab:purple",
    "waiting": "lightgray",
}


def draw(events: list[dict[str, object]], until_ms: float) -> Figure:
    names = {(each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}  # type: ignore[index]
    rows = sorted(names, key=lambda row: (row[1], row[0]))
    figure = Figure(figsize=(11, 0.8 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for category, color in COLORS.items():
            spans = [
                (each["ts"] / 1e3, each["dur"] / 1e3)  # type: ignore[operator]
                for each in events
                if each["ph"] == "X" and each["cat"] == category and (each["pid"], each["tid"]) == row
            ]
            axes.broken_barh(spans, (place - 0.4, 0.8), facecolors=color)
    axes.set_yticks(range(len(rows)), [f"rank {rank}, {names[rank, thread]}" for rank, thread in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, until_ms)
    axes.set_xlabel("ms since the prompt began")
    handles = [Patch(color=color, label=category) for category, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(COLORS), fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--ms", type=float, default=400.0, help="how much of it")
    asked = parser.parse_args()
    draw(json.loads(asked.trace.read_text(encoding="utf8"))["traceEvents"], asked.ms).savefig(asked.picture, dpi=110)


if __name__ == "__main__":
    main()
