"""Quality by bits on a real model: the paper, its peers and ours, without depth feedback, with it, and own part exact.

usage: python benchmarks/real_frontier.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT] [--tp N]
                                          [--peers CODEC ...] [--bits N ...] [--transforms N ...] [--real]
       python benchmarks/real_frontier.py --draw FILE.png --json FILE   (the runs on the texts of the first one, by tp)

TEXT: as frontier.py has it; `make model` gets a real model. In FP32. A row gives bits a value (of two_shot: the mean of
what ranks put in and of the sum, which travels again, the last sum's included), KL in nats from the uncompressed model
with its 95 % interval over sequences, top-1 agreement, and the change of perplexity. `way`: "plain", calibrated and
served without feedback; "feedback"; "own part", with a rank's own part exact, too, where ranks hold whole heads. With
--transforms also `transform` of so many bits, which takes minutes a row. With --real rows are of real ranks.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import reporting
from scoring import Texts

from narrowcast import Plan
from narrowcast.calibration import Observations, observe
from narrowcast.calibration.moments import MomentsNeeded
from narrowcast.evaluation import Evaluation, evaluate, evaluate_on_ranks

ALGORITHMS = "one_shot", "two_shot"
PEERS = {
    "int4-feature": "the paper: static int4, outliers in BF16",
    "int4-group128": "Flash Communication: groups of 128",
    "int4-group32-sym": "QuickReduce: groups of 32",
    "mxfp4": "MXFP4",
}
BITS = 4.19, 3.4, 2.5, 1.5  # of `allocated`
PLAIN_BITS = (3.4,)
OURS = "allocated"
WITH_MATRIX = "transform"

Row = dict[str, Any]


Score = Callable[[Plan, str], Evaluation]  # of a plan and an algorithm


def row(score: Score, codec: str, way: str, plan: Plan, algorithm: str) -> Row:
    found = score(plan, algorithm)
    return {
        "codec": codec,
        "way": way,
        "algorithm": algorithm,
        "bits_per_value": found.report.bits_per_value,
        "kl_nats": found.score.kl_nats,
        "kl_interval": found.score.intervals["kl_nats"],
        "top1_agreement": found.score.top1_agreement,
        "perplexity_change": found.score.perplexity_change,
    }


def simulated(texts: Texts, plan: Plan, algorithm: str) -> Evaluation:
    return evaluate(texts.model, plan, texts.batches, algorithm=algorithm, reference=texts.reference)


def on_ranks(texts: Texts, plan: Plan, algorithm: str) -> Evaluation:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan"
        plan.save(path)
        found = evaluate_on_ranks(str(texts.folder), path, texts.batches, algorithm=algorithm, dtype="float32")
    assert found is not None, "the ranks were started here"
    return found


def ways(seen: Observations, codec: str, *, plain: bool) -> Iterator[tuple[str, Plan]]:
    """A codec's plans, as they are and with less."""
    if plain:
        yield "plain", seen.plan(codec, feedback=False, measured=False)
    plan = seen.plan(codec, measured=False)
    yield "feedback", replace(plan, feedback=replace(plan.feedback, readers={}))
    if plan.feedback.read:
        yield "own part", plan


def rows(
    seen: Observations,
    score: Score,
    peers: Sequence[str],
    bits_of_ours: Sequence[float],
    of_transforms: Sequence[float],
) -> Iterator[Row]:
    for codec in peers:
        for way, plan in ways(seen, codec, plain=True):
            yield from (row(score, codec, way, plan, algorithm) for algorithm in ALGORITHMS)
    for bits in bits_of_ours:
        for algorithm in ALGORITHMS:
            codec = f"{OURS}(bits={bits:g}, algorithm={algorithm})"
            for way, plan in ways(seen, codec, plain=bits in PLAIN_BITS):
                yield row(score, OURS, way, plan, algorithm)
    for bits in of_transforms:
        for algorithm in ALGORITHMS:
            plan = seen.plan(f"{WITH_MATRIX}(bits={bits:g}, algorithm={algorithm})", measured=False)
            yield row(score, WITH_MATRIX, "own part" if plan.feedback.read else "feedback", plan, algorithm)


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL against bits: a row of panels for each number of ranks, a panel for each algorithm."""
    from matplotlib.figure import Figure

    rows_by_tp: dict[int, list[Row]] = {}
    texts = "calibrated_on", "scored_on"
    for run in sorted(runs, key=lambda run: -run["tp_size"]):
        if run.get("real") or any(run[name] != runs[0][name] for name in texts):
            continue
        rows_by_tp.setdefault(run["tp_size"], []).extend(run["rows"])
    figure = Figure(figsize=(11, 4.6 * len(rows_by_tp)), layout="constrained")
    panels = figure.subplots(len(rows_by_tp), 2, sharex=True, sharey=True, squeeze=False)
    colors = dict(zip(PEERS, ("tab:gray", "tab:brown", "tab:olive", "tab:purple"), strict=True))
    colors |= {OURS: "tab:blue", WITH_MATRIX: "tab:red"}
    markers = {"plain": "s", "feedback": "o", "own part": "*"}
    for (tp_size, found_rows), both in zip(rows_by_tp.items(), panels, strict=True):
        for axes, algorithm in zip(both, ALGORITHMS, strict=True):
            for codec, color in colors.items():
                for way, marker in markers.items():
                    found = [
                        (each["bits_per_value"], each["kl_nats"])
                        for each in found_rows
                        if (each["codec"], each["way"], each["algorithm"]) == (codec, way, algorithm)
                    ]
                    if found:
                        label = f"{PEERS.get(codec, codec)}, {way}"
                        line = "" if codec in PEERS else "-"
                        axes.plot(*zip(*sorted(found), strict=True), marker + line, color=color, label=label)
            paper = next(
                each for each in found_rows if (each["codec"], each["algorithm"]) == ("int4-feature", algorithm)
            )
            axes.axhline(paper["kl_nats"], color="tab:gray", linewidth=1, linestyle=":")
            axes.set_yscale("log")
            axes.set_title(f"{algorithm}, TP {tp_size}")
            axes.grid(alpha=0.3, which="both")
    for axes in panels[-1]:
        axes.set_xlabel("bits a value")
    for axes in panels[:, 0]:
        axes.set_ylabel("KL from the uncompressed model, nats")
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--bits", nargs="*", type=float, default=BITS)
    parser.add_argument("--transforms", nargs="*", type=float, default=())
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="FILE.png")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if asked.draw:
        draw(reporting.read(asked.json), asked.draw)
        return
    texts, table = Texts.of(asked, in_fp32=True), []
    score = partial(on_ranks if asked.real else simulated, texts)
    moments: MomentsNeeded = "full" if asked.transforms else "diagonal"
    seen = observe(texts.model, texts.calibration, tp_size=asked.tp, moments=moments)
    for found in rows(seen, score, asked.peers, asked.bits, asked.transforms):
        table.append(found)
        print(*(f"{value:.5g}" if isinstance(value, float) else value for value in found.values()), flush=True)
    reporting.write(asked.json, **texts.setting, tp_size=asked.tp, real=asked.real, rows=table)


if __name__ == "__main__":
    main()
