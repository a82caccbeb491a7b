"""What every codec costs: bits a value, error of the sums, and how far the model's answers move.

usage: python benchmarks/codecs.py [--json FILE] [--text FILE] [--sequences N] [PRESET...]

The bundled model is calibrated on its own calibration.txt and scored on its scoring.txt (both sampled from it), TP 8
simulated in one process, every row-parallel layer coded. Prints, for each preset (by default for all of them) and
both algorithms: bits a value, the relative RMS error of the sums (root of the mean square over sites, all that comes
before a site being exact), and KL in nats from the uncompressed model with its standard error over sequences.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import narrowcast
from narrowcast.calibrate import Observations, observe
from narrowcast.cli.files import DEFAULT_LENGTH, check_report, sequences, write_report
from narrowcast.codecs import PRESETS
from narrowcast.evaluate import compare, log_probs
from narrowcast.integrations import load_engine

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"
TP_SIZE, NUM_CALIBRATION = 8, 32


def rows(seen: Observations, text: Sequence[Any], presets: Sequence[str]) -> Iterator[dict[str, Any]]:
    model = seen.model
    reference = [log_probs(model, ids) for ids in text]
    for preset in presets:
        plan = seen.plan(preset)
        for algorithm in ("one_shot", "two_shot"):
            with narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
                found = [log_probs(model, ids) for ids in text]
                report = handle.report()
            each = [compare([r], [f], [ids]) for r, f, ids in zip(reference, found, text, strict=True)]
            kl = [score.kl_nats for score in each]
            yield {
                "preset": preset,
                "algorithm": algorithm,
                "bits_per_value": report.bits_per_value,
                "relative_rms": statistics.mean(site.error[algorithm] ** 2 for site in plan.sites.values()) ** 0.5,
                "kl_nats": statistics.mean(kl),
                "standard_error": statistics.stdev(kl) / len(kl) ** 0.5,
                "top1_agreement": statistics.mean(score.top1_agreement for score in each),
                "saturated": report.num_saturated,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=list(PRESETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", type=Path, default=MODEL / "scoring.txt")
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
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
