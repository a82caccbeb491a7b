"""How few bits keep how much: every family of codecs over a range of bits.

usage: python benchmarks/frontier.py --json FILE [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N ...]
       python benchmarks/frontier.py --tokens --json FILE      (how much calibration text is enough, and whose)
       python benchmarks/frontier.py --codebooks --json FILE   (which quantizer suits what remains after scaling)
       python benchmarks/frontier.py --draw FILE.png --json FILE     (draws what an earlier run wrote)

TEXT: books (Gutenberg; other books to calibrate on than to score), wikitext (WikiText-2; likewise), or own (sampled
from the bundled model). Every row-parallel layer is coded, for TP ranks simulated in one process. A row gives bits a
value (of two_shot: the mean of what ranks put in and of the sum, which travels again), KL in nats from the uncompressed
model with its 95 % interval over sequences, top-1 agreement, and the change of perplexity. `bound`: what a Gaussian
source of the measured second moments would cost at that rate at least, independent ranks coded along their own axes, to
second order in the error.
"""

import argparse
import importlib
import lzma
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from scoring import MODEL
from torch import Tensor, nn

from narrowcast import Plan
from narrowcast.calibration import CodecByKind, ModelRecipe, observe
from narrowcast.calibration.fit import Budgeted, Form, stage_axes
from narrowcast.calibration.moments import Moments
from narrowcast.codecs import AllocatedCodec, lloyd_max, token_scale
from narrowcast.codecs.allocation import BLOCK
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.files import check_report, read_report, write_report
from narrowcast.rotation.axes import hadamard, joint, principal
from narrowcast.rotation.rotate import rotate
from narrowcast.scores import log_probs

SHARED = Path(__file__).parents[2] / "shared"
LENGTH, SEED = 256, 5
ALGORITHMS: tuple[Budgeted, ...] = ("one_shot", "two_shot")

PEERS = {
    "the paper: static, outliers in BF16": ("int3-feature", "int4-feature", "int6-feature", "int8-feature"),
    "Flash Communication: groups of 128": ("int2-group128", "int3-group128", "int4-group128", "int6-group128"),
    "QuickReduce: groups of 32": ("int2-group32-sym", "int3-group32-sym", "int4-group32-sym"),
    "MXFP4": ("mxfp4",),
    "FP8": ("fp8-e4m3-token",),
    "BF16": ("bf16",),
}
UNGUARDED = "the paper, no guard"
FITTED: dict[str, tuple[Form, tuple[float, ...]]] = {
    "allocated": ("features", (1.5, 2.0, 2.5, 3.0, 3.4, 4.0)),
    "transform, blocks of 64": ("blocks", (1.3, 2.0)),
    "transform, axes of the site": ("site", (1.0, 1.3, 2.0, 2.4)),
    "transform, each rank's axes": ("ranks", (0.5, 0.75, 1.0, 1.3, 2.0, 2.4)),
}
ROTATED = {"joint": (1.5, 2.0, 2.2, 2.4, 3.0, 3.2, 3.4, 4.0), "principal": (2.0, 3.0), "hadamard": (2.0, 3.0)}


def read(name: str, purpose: str) -> str:
    if name == "own":
        return (MODEL / ("calibration.txt" if purpose == "calibrate" else "scoring.txt")).read_text(encoding="utf8")
    if name == "wikitext":
        file = "wikitext_train_1000.json" if purpose == "calibrate" else "wikitext2-raw-test.joined.txt"
        return (SHARED / "data" / "text" / file).read_text(encoding="utf8")
    file = "train.txt.xz" if purpose == "calibrate" else "val.txt.xz"
    with lzma.open(SHARED / "data" / "text" / file, "rt", encoding="utf8") as books:
        return books.read()


def sequences(tokenizer: Any, name: str, purpose: str, number: int) -> list[Tensor]:
    """Ids [1, 256] from random places of the text."""
    text, places = read(name, purpose), random.Random(SEED)
    found = []
    while len(found) < number:
        start = places.randrange(max(1, len(text) - 6000))
        ids = tokenizer(text[start : start + 6000], verbose=False).input_ids[4 : 4 + LENGTH]
        if len(ids) == LENGTH:
            found.append(torch.tensor([ids]))
    return found


class Frontier:
    """A model, its text, and rows of what plans cost."""

    def __init__(self, folder: Path, calibrate: str, score: str, numbers: tuple[int, int]) -> None:
        engine = load_engine()
        self.folder, tokenizer = folder, engine.load_tokenizer(folder)
        self.model = engine.load(folder)
        self.calibration = sequences(tokenizer, calibrate, "calibrate", numbers[0])
        self.batches = sequences(tokenizer, score, "score", numbers[1])
        self.reference = [log_probs(self.model, ids) for ids in self.batches]

    def row(self, family: str, name: str, plan: Plan, algorithm: Budgeted, model: nn.Module) -> dict[str, Any]:
        found = evaluate(model, plan, self.batches, algorithm=algorithm, reference=self.reference)
        score, report = found.score, found.report
        num_features = plan.model.config["hidden_size"]
        sites = [site.codecs for site in plan.sites.values()]
        stages = [
            sum(8 * codecs[stage].row_nbytes(_width(codecs[stage], num_features)) for codecs in sites)
            / (num_features * len(sites))
            for stage in (0, 1)
        ]
        return {
            "family": family,
            "codec": name,
            "tp_size": plan.tp_size,
            "algorithm": algorithm,
            "bits_per_value": report.bits_per_value,
            "bits_of_stages": stages[: 1 if algorithm == "one_shot" else 2],
            "kl_nats": score.kl_nats,
            "kl_interval": score.intervals["kl_nats"],
            "top1_agreement": score.top1_agreement,
            "top1_interval": score.intervals["top1_agreement"],
            "perplexity_change": score.perplexity_change,
            "perplexity_change_interval": score.intervals["perplexity_change"],
            "plan_nbytes": len(plan.to_bytes()),
            "saturated": report.num_saturated,
            "guarded": report.num_guarded,
        }

    def rows(self, tp_size: int) -> Iterator[dict[str, Any]]:
        seen = observe(self.model, self.calibration, tp_size=tp_size, moments="full")
        for family, presets in PEERS.items():
            for preset in presets:
                plan = seen.plan(preset)
                for algorithm in ALGORITHMS:
                    yield self.row(family, preset, plan, algorithm, self.model)
        for algorithm in ALGORITHMS:
            with _no_guard():
                row = self.row(UNGUARDED, "int4-feature", seen.plan("int4-feature"), algorithm, self.model)
            yield row
        for family, (form, budgets) in FITTED.items():
            for bits in budgets:
                for algorithm in ALGORITHMS:
                    recipe = ModelRecipe(bits=bits, form=form, budgeted=algorithm)
                    yield self.row(family, f"{form} {bits:g}", seen.plan(recipe), algorithm, self.model)
        for name, rotation in rotations(seen.moments).items():
            model = load_engine().load(self.folder)
            rotate(model, rotation)
            rotated = observe(model, self.calibration, tp_size=tp_size, moments="diagonal")
            for bits in ROTATED[name]:
                for algorithm in ALGORITHMS:
                    plan = rotated.plan(ModelRecipe(bits=bits, budgeted=algorithm))
                    yield self.row(f"rotated ({name}) and allocated", f"{name} {bits:g}", plan, algorithm, model)
        for algorithm in ALGORITHMS:
            for bits in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
                kl = bound(seen.moments, bits, algorithm)
                yield {
                    "family": "bound",
                    "tp_size": tp_size,
                    "algorithm": algorithm,
                    "bits_per_value": bits,
                    "kl_nats": kl,
                }

    def quick(self, codec: CodecByKind, algorithm: Budgeted, tp_size: int, number: int) -> dict[str, Any]:
        """One plan from the first `number` sequences, none of which is held out."""
        plan = observe(self.model, self.calibration[:number], tp_size=tp_size, moments="full").plan(codec)
        return self.row("", str(codec), plan, algorithm, self.model)


def _width(codec: Any, num_features: int) -> int:
    return codec.scale.shape[1] if isinstance(codec, AllocatedCodec) else num_features


@contextmanager
def _no_guard() -> Iterator[None]:
    """As the paper has it: a value is clipped, however far it lies beyond its calibrated range."""
    module = importlib.import_module("narrowcast.codecs.feature")
    original = module.guard_for
    module.guard_for = lambda *_: None
    try:
        yield
    finally:
        module.guard_for = original


def rotations(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    covariances = {site: each.partial.sum(dim=0) + each.total[0] for site, each in moments.items()}
    fishers = {site: each.fisher for site, each in moments.items()}
    return {
        "joint": joint(covariances, fishers),
        "principal": principal(covariances),
        "hadamard": hadamard(len(next(iter(fishers.values())))),
    }


def bound(moments: Mapping[str, Moments], bits: float, algorithm: Budgeted) -> float:
    """Reverse water-filling (Cover & Thomas, 10.3.3) over all components: KL of half the energy that is left."""
    energies, weights, num_values = [], [], 0.0
    for each in moments.values():
        partial, total = stage_axes(each, "ranks", 0, algorithm)
        num_ranks = len(partial.energy)
        stages = [(partial.energy, 1 / num_ranks), (total.energy, 1.0)][: 1 if algorithm == "one_shot" else 2]
        for energy, weight in stages:  # a bit of each rank's values is one bit a value
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


def tokens(frontier: Frontier, calibrate: str) -> Iterator[dict[str, Any]]:
    cases: tuple[tuple[CodecByKind, Budgeted], ...] = (
        ("int4-feature", "one_shot"),
        (ModelRecipe(bits=3.0, budgeted="one_shot"), "one_shot"),
        (ModelRecipe(bits=2.0, form="site", budgeted="one_shot"), "one_shot"),
        (ModelRecipe(bits=1.0, form="ranks", budgeted="one_shot"), "one_shot"),
        (ModelRecipe(bits=1.3, form="ranks", budgeted="two_shot"), "two_shot"),
    )
    for number in (1, 2, 4, 8, 16, 32, 64):
        for codec, algorithm in cases:
            row = frontier.quick(codec, algorithm, 8, number)
            name = codec if isinstance(codec, str) else f"{codec.form} {codec.bits:g}"
            yield {**row, "codec": name, "calibrated_on": calibrate, "num_tokens": number * LENGTH}


def codebooks(frontier: Frontier) -> Iterator[dict[str, Any]]:
    """Mean square error of a coded value, relative to its variance, by width: of blocks that are given that width."""
    seen = observe(frontier.model, frontier.calibration, tp_size=8, moments="diagonal")
    plan = seen.plan(ModelRecipe(bits=3.0, budgeted="one_shot"))
    values = _scaled_values(frontier, plan)
    for width in range(1, 9):
        u = torch.cat(values.get(width, [torch.empty(0)]))
        if len(u) < 10000:
            continue
        fit, test = u[::2], u[1::2]
        yield {
            "bits": width,
            "num_values": len(u),
            "kurtosis": float((u**4).mean() / u.square().mean() ** 2),
            "normal Lloyd-Max": _error(test, lloyd_max.levels(width)),
            "Lloyd-Max of these values": _error(test, _lloyd(fit, width)),
            "clipped uniform": min(
                _error(test, (torch.arange(2 ** (width - 1)) + 0.5) * 2 * reach / 2**width)
                for reach in torch.linspace(0.8, 8, 60).tolist()
            ),
        }


def _scaled_values(frontier: Frontier, plan: Plan) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    encode = AllocatedCodec.encode

    def watch(codec: Any, x_TE: Tensor, *, source: int, **options: Any) -> Tensor:
        order, u_TE = codec.order[source].long(), x_TE.float() / codec.scale[source].float()
        coded = order[: BLOCK * int((codec.widths[source] > 0).sum())]
        scale = token_scale.TOKEN_SCALES[token_scale.scale_code(token_scale.mean_square(u_TE[:, coded]))][:, None]
        for place, width in enumerate(codec.widths[source].tolist()):
            own = order[BLOCK * place : BLOCK * (place + 1)]
            if width:
                found.setdefault(width, []).append((u_TE[:, own] / scale).flatten()[::7])
        return encode(codec, x_TE, source=source, **options)

    AllocatedCodec.encode = watch
    try:
        evaluate(frontier.model, plan, frontier.batches[:4], algorithm="one_shot", reference=frontier.reference[:4])
    finally:
        AllocatedCodec.encode = encode
    return found


def _error(u: Tensor, levels: Tensor) -> float:
    nearest = levels[torch.bucketize(u.abs(), (levels[1:] + levels[:-1]) / 2)]
    return float((u.abs() - nearest).square().mean() / u.square().mean())


def _lloyd(u: Tensor, width: int) -> Tensor:
    magnitude = u.abs()
    levels = lloyd_max.levels(width)
    for _ in range(100):
        cell = torch.bucketize(magnitude, (levels[1:] + levels[:-1]) / 2)
        count = torch.zeros(len(levels)).index_add_(0, cell, torch.ones_like(magnitude))
        total = torch.zeros(len(levels)).index_add_(0, cell, magnitude)
        levels = torch.where(count > 0, total / count.clamp(min=1), levels).sort().values
    return levels


def draw(table: Sequence[Mapping[str, Any]], path: Path, tp_size: int) -> None:
    """KL against bits, a panel for each algorithm."""
    from matplotlib.figure import Figure

    styles = {
        UNGUARDED: ("black", "s"),
        "the paper: static, outliers in BF16": ("tab:gray", "s-"),
        "Flash Communication: groups of 128": ("tab:brown", "v-"),
        "QuickReduce: groups of 32": ("tab:olive", "^-"),
        "allocated": ("tab:cyan", "o-"),
        "rotated (joint) and allocated": ("tab:blue", "o-"),
        "transform, axes of the site": ("tab:orange", "D-"),
        "transform, each rank's axes": ("tab:red", "D-"),
        "bound": ("black", ":"),
    }
    labels = {
        "the paper: static, outliers in BF16": "the same with our guard",
        UNGUARDED: "the paper: static, outliers in BF16",
        "allocated": "allocated (free at run time)",
        "rotated (joint) and allocated": "rotated model, allocated (free at run time)",
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
            label = labels.get(family, family)
            axes.plot(*zip(*spots, strict=True), style, color=color, markersize=4, linewidth=1.3, label=label)
        floor = [row["kl_nats"] for row in table if (row["family"], row["algorithm"]) == ("BF16", algorithm)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibrate", choices=("books", "wikitext", "own"), default="own")
    parser.add_argument("--score", choices=("books", "wikitext", "own"), default="own")
    parser.add_argument("--tp", type=int, nargs="+", default=[8])
    parser.add_argument("--calibration-sequences", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--codebooks", action="store_true")
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(read_report(arguments.json, remedy="Run it first.")["rows"], arguments.draw, arguments.tp[0])
        return
    check_report(arguments.json)
    numbers = arguments.calibration_sequences, arguments.sequences
    frontier = Frontier(arguments.model, arguments.calibrate, arguments.score, numbers)
    if arguments.tokens:
        rows = tokens(frontier, arguments.calibrate)
    elif arguments.codebooks:
        rows = codebooks(frontier)
    else:
        rows = (row for tp_size in arguments.tp for row in frontier.rows(tp_size))
    table = []
    for row in rows:
        table.append(row)
        print(
            " ".join(f"{value:.5g}" if isinstance(value, float) else f"{value}" for value in row.values()), flush=True
        )
    setting = {
        "command": shlex.join(["python", *sys.argv]),
        "model": arguments.model.parent.name if arguments.model.name == "hf" else arguments.model.name,
        "calibrated_on": arguments.calibrate,
        "scored_on": arguments.score,
        "num_calibration_sequences": numbers[0],
        "num_sequences": numbers[1],
    }
    write_report(arguments.json, setting | {"rows": table})


if __name__ == "__main__":
    main()
