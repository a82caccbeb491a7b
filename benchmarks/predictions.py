"""The errors of `narrowcast estimate --link`: predicted times of sums against measured ones.

usage: python benchmarks/predictions.py [REPORT.json ...] [--json FILE]

REPORT.json: reports of `narrowcast bench collective --link ...` on this machine; by default the result that is kept.
Prints predicted and measured microseconds of each row on a link, and the distribution of their ratio by link.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import reporting
import torch

from narrowcast.codecs import Ranges, recipe
from narrowcast.collectives import Hops
from narrowcast.launch.link import Link
from narrowcast.perf.cost import CostModel, measure_coding, plain_coding
from narrowcast.plan.decisions import Choice


def predicted_us(row: dict[str, Any]) -> float:
    num_features = min(row["nbytes"] // 2, 4096)
    num_tokens, name = row["nbytes"] // 2 // num_features, "bf16" if row["codec"] == "native" else row["codec"]
    made = recipe(name)
    ranges = (Ranges.of(torch.ones(sources, 1, num_features)) for sources in (row["world_size"], 1))
    hops = Hops(tuple(made.codec(each) for each in ranges))
    cost = CostModel(
        hops=hops,
        num_features=num_features,
        world_size=row["world_size"],
        link=Link.parse(row["link"]),
        transport=row["transport"],
        coded=measure_coding(hops.codecs[0], num_features),
        plain=plain_coding(num_features),
    )
    native = row["codec"] == "native"
    seconds = cost.sum_s(Choice("native") if native else Choice("coded", row["algorithm"]), num_tokens)
    assert seconds is not None
    return 1e6 * seconds


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for report in arguments.reports or [reporting.RESULTS / "bench-collective.json"]:
        for row in (row for run in reporting.read(report) for row in run["rows"]):
            if row["link"] is not None and row["transport"] != "socket":
                figures = {key: row[key] for key in ("link", "transport", "codec", "algorithm", "world_size", "nbytes")}
                predicted, measured = predicted_us(row), row["median_us"]
                table.append(figures | {"predicted_us": predicted, "measured_us": measured})
    by_link = defaultdict(list)
    print("| link | transport | codec | algorithm | ranks | bytes | predicted us | measured us | ratio |")
    print("| --- " * 9 + "|")
    for row in table:
        ratio = row["predicted_us"] / row["measured_us"]
        by_link[row["link"], row["transport"]].append(abs(ratio - 1))
        cells = [*list(row.values())[:6], f"{row['predicted_us']:.0f}", f"{row['measured_us']:.0f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    summary = [
        {"link": link, "transport": transport, "num_sums": len(errors), "median": statistics.median(errors),
         "largest": max(errors)}
        for (link, transport), errors in by_link.items()
    ]  # fmt: skip
    for each in summary:
        print("{link} {transport}: median error {median:.0%}, largest {largest:.0%} of {num_sums} sums".format(**each))
    reporting.write(arguments.json, summary=summary)


if __name__ == "__main__":
    main()
