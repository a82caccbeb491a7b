"""Quality by bits: every family of codecs over a range of bits.

usage: python benchmarks/frontier.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N ...]
       python benchmarks/frontier.py --draw FILE.png --json FILE     (draws the first run of a result)

TEXT: a file, perhaps compressed (.xz); by default samples of the bundled model. The figures that are kept took
WikiText-2 (raw) and books of Project Gutenberg, one to calibrate on and the other to score on. Every row-parallel layer
is coded, for TP ranks simulated in one process. A row gives bits a value (of two_shot: the mean of what ranks put in
and of the sum, which travels again), KL in nats from the uncompressed model with its 95 % interval over sequences,
top-1 agreement, and the change of perplexity. `bound`: what a Gaussian source of the measured second moments would cost
at that rate at least, independent ranks coded along their own axes, to second order in the error.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import reporting
import torch
from scoring import Texts
from torch import Tensor, nn

from narrowcast import Plan
from narrowcast.calibration import observe
from narrowcast.calibration.moments import Moments
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.rotation.axes import hadamard, joint, principal
from narrowcast.rotation.rotate import rotate

ALGORITHMS = "one_shot", "two_shot"

# Families, and their codecs.
PEERS = {
    "paper": ("feature(bits=3)", "int4-feature", "int6-feature", "int8-feature"),
    "group128": ("group(bits=2, size=128)", "group(bits=3, size=128)", "int4-group128", "group(bits=6, size=128)"),
    "group32": tuple(f"group(bits={bits}, size=32, symmetric=true)" for bits in (2, 3, 4)),
    "mxfp4": ("mxfp4",),
    "fp8": ("fp8",),
    "bf16": ("bf16",),
}
UNGUARDED = "paper, no guard"
FITTED = {
    "allocated": ("allocated({})", (1.5, 2.0, 2.5, 3.0, 3.4, 4.0)),
    "blocks": ("transform(axes=blocks, {})", (1.3, 2.0)),
    "site": ("transform(axes=site, {})", (1.0, 1.3, 2.0, 2.4)),
    "ranks": ("transform(axes=ranks, {})", (0.5, 0.75, 1.0, 1.3, 2.0, 2.4)),
}
ROTATED = {"joint": (1.5, 2.0, 2.2, 2.4, 3.0, 3.2, 3.4, 4.0), "principal": (2.0, 3.0), "hadamard": (2.0, 3.0)}


def budget(codec: str, bits: float, algorithm: str) -> str:
    """A codec with so many bits a value, counted for this algorithm."""
    return codec.format(f"bits={bits:g}, algorithm={algorithm}")


def row(texts: Texts, family: str, codec: str, plan: Plan, algorithm: str, model: nn.Module) -> dict[str, Any]:
    found = evaluate(model, plan, texts.batches, algorithm=algorithm, reference=texts.reference)
    score, report = found.score, found.report
    return {
        "family": family,
        "codec": codec,
        "tp_size": plan.tp_size,
        "algorithm": algorithm,
        "bits_per_value": report.bits_per_value,
        "kl_nats": score.kl_nats,
        "kl_interval": score.intervals["kl_nats"],
        "top1_agreement": score.top1_agreement,
        "perplexity_change": score.perplexity_change,
    }


def rows(texts: Texts, tp_size: int) -> Iterator[dict[str, Any]]:
    model = texts.model
    seen = observe(model, texts.calibration, tp_size=tp_size, moments="full")
    for family, codecs in PEERS.items():
        for codec in codecs:
            plan = seen.plan(codec)
            yield from (row(texts, family, codec, plan, algorithm, model) for algorithm in ALGORITHMS)
    for algorithm in ALGORITHMS:
        with _no_guard():
            found = row(texts, UNGUARDED, "int4-feature", seen.plan("int4-feature"), algorithm, model)
        yield found
    for family, (codec, budgets) in FITTED.items():
        for bits in budgets:
            for algorithm in ALGORITHMS:
                plan = seen.plan(budget(codec, bits, algorithm))
                yield row(texts, family, f"{family} {bits:g}", plan, algorithm, model)
    yield from rotated_rows(texts, tp_size, seen.moments)
    for algorithm in ALGORITHMS:
        for bits in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
            kl = bound(seen.moments, bits, algorithm)
            figures = {"algorithm": algorithm, "bits_per_value": bits, "kl_nats": kl}
            yield {"family": "bound", "codec": None, "tp_size": tp_size, **figures}


def rotated_rows(texts: Texts, tp_size: int, moments: Mapping[str, Moments]) -> Iterator[dict[str, Any]]:
    for name, rotation in rotations(moments).items():
        model = load_engine().load(texts.folder)
        rotate(model, rotation)
        seen = observe(model, texts.calibration, tp_size=tp_size, moments="diagonal")
        for bits in ROTATED[name]:
            for algorithm in ALGORITHMS:
                plan = seen.plan(budget("allocated({})", bits, algorithm))
                yield row(texts, f"rotated {name}", f"{name} {bits:g}", plan, algorithm, model)


@contextmanager
def _no_guard() -> Iterator[None]:
    """As the paper has it: a value is clipped, however far it lies beyond its calibrated range."""
    with mock.patch("narrowcast.codecs.feature.guard_for", lambda *_: None):
        yield


def rotations(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    covariances = {site: each.partial.sum(dim=0) + each.total[0] for site, each in moments.items()}
    fishers = {site: each.fisher for site, each in moments.items()}
    return {
        "joint": joint(covariances, fishers),
        "principal": principal(covariances),
        "hadamard": hadamard(len(next(iter(fishers.values())))),
    }


def bound(moments: Mapping[str, Moments], bits: float, algorithm: str) -> float:
    """Reverse water-filling (Cover & Thomas, 10.3.3) over all components: KL of half the energy that is left."""
    from narrowcast.calibration.fit import hop_axes
    from narrowcast.codecs import TransformRecipe

    along_ranks, recoded = TransformRecipe(axes="ranks"), algorithm == "two_shot"
    energies, weights, num_values = [], [], 0.0
    for each in moments.values():
        partial, total = hop_axes(each, along_ranks, recoded=recoded)
        num_ranks = len(partial.energy)
        hops = [(partial.energy, 1 / num_ranks), (total.energy, 1.0)][: 2 if recoded else 1]
        for energy, weight in hops:  # a bit of each rank's values is one bit a value
            energies.append(energy.flatten())
            weights.append(torch.full_like(energies[-1], weight))
            num_values += weight * energy.numel()
    energy, weight = torch.cat(energies).clamp(min=1e-30), torch.cat(weights)
    low, high = 1e-30, float(energy.max())
    for _ in range(200):
        # A component of one rank costs 1 / R of a bit a value, so that all ranks share one level.
        level = (low * high) ** 0.5
        rate = (weight * (energy / level).log2().clamp(min=0) / 2).sum() / num_values
        low, high = (level, high) if rate > bits else (low, level)
    return float(torch.minimum(energy, torch.tensor(level)).sum() / 2)


def draw(table: Sequence[Mapping[str, Any]], path: Path, tp_size: int) -> None:
    """KL against bits, a panel for each algorithm."""
    from matplotlib.figure import Figure

    styles = {
        UNGUARDED: ("black", "s"),
        "paper": ("tab:gray", "s-"),
        "group128": ("tab:brown", "v-"),
        "group32": ("tab:olive", "^-"),
        "allocated": ("tab:cyan", "o-"),
        "rotated joint": ("tab:blue", "o-"),
        "site": ("tab:orange", "D-"),
        "ranks": ("tab:red", "D-"),
        "bound": ("black", ":"),
    }
    labels = {
        UNGUARDED: "the paper: static, outliers in BF16",
        "paper": "the same with our guard",
        "group128": "Flash Communication: groups of 128",
        "group32": "QuickReduce: groups of 32",
        "allocated": "allocated (free at run time)",
        "rotated joint": "rotated model, allocated (free at run time)",
        "site": "transform, axes of the site",
        "ranks": "transform, each rank's axes",
        "bound": "Gaussian bound, to second order",
    }
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, algorithm in zip(panels, ALGORITHMS, strict=True):
        for family, (color, style) in styles.items():
            rows = [
                row
                for row in table
                if (row["family"], row["algorithm"], row["tp_size"]) == (family, algorithm, tp_size)
            ]
            rows.sort(key=lambda row: row["bits_per_value"])
            spots = [(row["bits_per_value"], row["kl_nats"]) for row in rows]
            axes.plot(*zip(*spots, strict=True), style, color=color, markersize=4, linewidth=1.3, label=labels[family])
        floor = [row["kl_nats"] for row in table if (row["family"], row["algorithm"]) == ("bf16", algorithm)]
        axes.axhline(floor[0], color="silver", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(5e-5, 0.5)
        axes.set_xlim(0.3, 6.7)
        axes.set_title(f"{algorithm}, TP {tp_size}")
        axes.set_xlabel("bits a value")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("KL from the uncompressed model, nats\n(gray line: sums in BF16)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, nargs="+", default=[8])
    parser.add_argument("--draw", type=Path, metavar="FILE.png")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if asked.draw:
        draw(reporting.read(asked.json)[0]["rows"], asked.draw, asked.tp[0])
        return
    texts, table = Texts.of(asked), []
    for found in (found for tp_size in asked.tp for found in rows(texts, tp_size)):
        table.append(found)
        print(*(f"{value:.5g}" if isinstance(value, float) else value for value in found.values()), flush=True)
    reporting.write(asked.json, **texts.setting, rows=table)


if __name__ == "__main__":
    main()
