"""What every codec costs: bits a value, error of the sums, and how far the model's answers move.

usage: python benchmarks/codecs.py [--json FILE] [--text FILE] [--sequences N] [PRESET...]
       python benchmarks/codecs.py --draw FILE.png --json FILE      (draws what an earlier run wrote)

The bundled model is calibrated on its own calibration.txt and scored on its scoring.txt (both sampled from it), TP 8
simulated in one process, every row-parallel layer coded. Prints, for each preset (by default for all of them) and
both algorithms: bits a value, the relative RMS error of the sums (root of the mean square over sites, all that comes
before a site being exact), and KL in nats from the uncompressed model with its standard error over sequences.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from narrowcast.calibration import Observations, observe
from narrowcast.calibration.text import DEFAULT_LENGTH, sequences
from narrowcast.codecs import PRESETS
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.files import check_report, write_report
from narrowcast.scores import log_probs

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"
TP_SIZE, NUM_CALIBRATION = 8, 32


def rows(seen: Observations, text: Sequence[Any], presets: Sequence[str]) -> Iterator[dict[str, Any]]:
    model = seen.model
    reference = [log_probs(model, ids) for ids in text]
    for preset in presets:
        plan = seen.plan(preset)
        for algorithm in ("one_shot", "two_shot"):
            found = evaluate(model, plan, text, algorithm=algorithm, reference=reference)
            score, report = found.score, found.report
            yield {
                "preset": preset,
                "algorithm": algorithm,
                "bits_per_value": report.bits_per_value,
                "relative_rms": statistics.mean(site.error[algorithm] ** 2 for site in plan.sites.values()) ** 0.5,
                "kl_nats": score.kl_nats,
                "standard_error": score.by_sequence["kl_nats"].standard_error,
                "top1_agreement": score.top1_agreement,
                "saturated": report.num_saturated,
            }


# Formats by the end of their presets' names: each is a curve over its widths.
CURVES = {
    "the paper: static, outliers in BF16": "-feature",
    "groups of 128 (Flash Communication)": "-group128",
    "groups of 32 (Flash Communication)": "-group32",
    "groups of 32, symmetric (QuickReduce)": "-group32-sym",
    "groups of 128, spikes (FlashCommunication V2)": "-group128-spike",
}
POINTS = "fp8-e4m3-token", "mxfp8", "mxfp6-e2m3", "mxfp4", "nvfp4"


def draw(table: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against bits, a panel for each algorithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, algorithm in zip(panels, ("one_shot", "two_shot"), strict=True):
        found = {row["preset"]: row for row in table if row["algorithm"] == algorithm}
        for label, end in CURVES.items():
            names = [f"int{bits}{end}" for bits in range(2, 9) if f"int{bits}{end}" in found]
            spots = [(found[name]["bits_per_value"], found[name]["kl_nats"]) for name in names]
            axes.plot(*zip(*spots, strict=True), "o-", markersize=4, linewidth=1.2, label=label)
        for name in POINTS:
            spot = found[name]["bits_per_value"], found[name]["kl_nats"]
            offset = (5, -9) if name.startswith("fp8") else (5, 4)
            axes.plot(*spot, "k^", markersize=5)
            axes.annotate(name, spot, offset, fontsize=7, textcoords="offset points")
        axes.axhline(found["bf16"]["kl_nats"], color="gray", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_xlim(1.8, 10)
        axes.set_title(f"{algorithm}, TP {TP_SIZE}")
        axes.set_xlabel("bits a value")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL from the uncompressed model, nats\n(dotted: sums in BF16)")
    panels[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=list(PRESETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", type=Path, default=MODEL / "scoring.txt")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.json.read_text(encoding="utf8"))["rows"], arguments.draw)
        return
    check_report(arguments.json)
    engine = load_engine()
    model, tokenizer = engine.load(MODEL), engine.load_tokenizer(MODEL)
    calibration = sequences(tokenizer, MODEL / "calibration.txt", length=DEFAULT_LENGTH, limit=NUM_CALIBRATION)
    text = sequences(tokenizer, arguments.text, length=DEFAULT_LENGTH, limit=arguments.sequences)
    table = []
    for row in rows(observe(model, calibration, tp_size=TP_SIZE), text, arguments.presets):
        table.append(row)
        line = (
            "{preset:20} {algorithm}  bits {bits_per_value:7.4f}  RMS {relative_rms:.4f}  KL {kl_nats:.5f} ±"
            " {standard_error:.5f}  top-1 {top1_agreement:.2%}  clipped {saturated}"
        )
        print(line.format(**row), flush=True)
    if arguments.json:
        setting = {
            "command": shlex.join(["python", *sys.argv]),
            "model": MODEL.name,
            "text": arguments.text.name,
            "tp_size": TP_SIZE,
            "num_sequences": len(text),
            "num_tokens": sum(ids.numel() for ids in text),
        }
        write_report(arguments.json, setting | {"rows": table})


if __name__ == "__main__":
    main()
