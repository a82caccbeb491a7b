"""Costs of every codec: bits a value, error of the sums, and how far the model's answers move.

usage: python benchmarks/codecs.py [--json FILE] [--sequences N] [CODEC...]
       python benchmarks/codecs.py --draw FILE.png --json FILE      (draws an earlier run)

The bundled model is calibrated on its own calibration.txt and scored on its scoring.txt (both sampled from it), TP 8
simulated in one process, every row-parallel layer coded. Prints, for each codec (by default of every family) and
both algorithms: bits a value, the relative RMS error of the sums (root of the mean square over sites, all that comes
before a site being exact), and KL in nats from the uncompressed model with its standard error over sequences.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import reporting
from scoring import MODEL, setting_of, text

from narrowcast.calibration import Observations, observe
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.scores import log_probs

TP_SIZE, NUM_CALIBRATION = 8, 32

# Formats over their widths: each is a curve.
CURVES = {
    "the paper: static, outliers in BF16": [f"feature(bits={bits})" for bits in range(2, 9)],
    "groups of 128 (Flash Communication)": [f"group(bits={bits}, size=128)" for bits in range(2, 9)],
    "groups of 32 (Flash Communication)": [f"group(bits={bits}, size=32)" for bits in range(2, 9)],
    "groups of 32, symmetric (QuickReduce)": [f"group(bits={bits}, size=32, symmetric=true)" for bits in range(2, 9)],
    "groups of 128, spikes (FlashCommunication V2)": [
        f"group(bits={bits}, size=128, spikes=true)" for bits in range(2, 5)
    ],
}
POINTS = {
    "fp8": "fp8",
    "mxfp8": "minifloat(element=e4m3, scale=e8m0, size=32)",
    "mxfp6-e2m3": "minifloat(element=e2m3, scale=e8m0, size=32)",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
UNCOMPRESSED = "bf16"
CODECS = [UNCOMPRESSED, "int4", "int4-random", *(each for curve in CURVES.values() for each in curve), *POINTS.values()]


def rows(seen: Observations, batches: Sequence[Any], codecs: Sequence[str]) -> Iterator[dict[str, Any]]:
    model = seen.model
    reference = [log_probs(model, ids) for ids in batches]
    for codec in codecs:
        plan = seen.plan(codec)
        for algorithm in ("one_shot", "two_shot"):
            found = evaluate(model, plan, batches, algorithm=algorithm, reference=reference)
            score, report = found.score, found.report
            yield {
                "codec": codec,
                "algorithm": algorithm,
                "bits_per_value": report.bits_per_value,
                "relative_rms": statistics.mean(site.error[algorithm] ** 2 for site in plan.sites.values()) ** 0.5,
                "kl_nats": score.kl_nats,
                "standard_error": score.by_sequence["kl_nats"].standard_error,
                "top1_agreement": score.top1_agreement,
                "saturated": report.num_saturated,
            }


def draw(table: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against bits, a panel for each algorithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, algorithm in zip(panels, ("one_shot", "two_shot"), strict=True):
        found = {row["codec"]: row for row in table if row["algorithm"] == algorithm}
        for label, codecs in CURVES.items():
            spots = [(found[codec]["bits_per_value"], found[codec]["kl_nats"]) for codec in codecs]
            axes.plot(*zip(*spots, strict=True), "o-", markersize=4, linewidth=1.2, label=label)
        for name, codec in POINTS.items():
            spot = found[codec]["bits_per_value"], found[codec]["kl_nats"]
            offset = (5, -9) if name.startswith("fp8") else (5, 4)
            axes.plot(*spot, "k^", markersize=5)
            axes.annotate(name, spot, offset, fontsize=7, textcoords="offset points")
        axes.axhline(found[UNCOMPRESSED]["kl_nats"], color="gray", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_xlim(1.8, 10)
        axes.set_title(f"{algorithm}, TP {TP_SIZE}")
        axes.set_xlabel("bits a value")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL from the uncompressed model, nats\n(dotted: sums in BF16)")
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("codecs", nargs="*", metavar="CODEC", default=CODECS)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--draw", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(reporting.read(arguments.json)[0]["rows"], arguments.draw)
        return
    seen = observe(load_engine().load(MODEL), text("calibration.txt", NUM_CALIBRATION), tp_size=TP_SIZE)
    batches, table = text("scoring.txt", arguments.sequences), []
    for row in rows(seen, batches, arguments.codecs):
        table.append(row)
        line = (
            "{codec:40} {algorithm}  bits {bits_per_value:7.4f}  RMS {relative_rms:.4f}  KL {kl_nats:.5f} ±"
            " {standard_error:.5f}  top-1 {top1_agreement:.2%}  clipped {saturated}"
        )
        print(line.format(**row), flush=True)
    reporting.write(arguments.json, tp_size=TP_SIZE, **setting_of(batches), rows=table)


if __name__ == "__main__":
    main()
