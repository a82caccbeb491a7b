"""Costs and savings of the forms of embedding and logits: plain, coded, replicated.

usage: python benchmarks/vocabulary.py [--json FILE] [--sequences N]

The bundled model at TP 2 and 4, sums at int4-feature. Plain: rows of the embedding and logits travel in BF16. Coded:
one of them, or both, with a codec. Replicated: every rank holds both matrices, and nothing travels. Plain and coded
forms are simulated; the replicated one runs on real ranks (with tests/ranks.py: run this from a clone).

Prints bytes a token and rank in decoding (one token) and in prefill (a sequence, with logits for its last token or
for all), KL in nats from the uncompressed model, how much more that is than in the plain form on the same sequences,
both with standard errors over sequences, and top-1 agreement. Then the same bytes, by arithmetic, for the shapes of
two large models, and what replication takes of each rank's memory.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import reporting
from scoring import MODEL, Scorer, figures, setting_of, text

import narrowcast
import ranks
from narrowcast import Plan
from narrowcast.calibration import Observations, observe
from narrowcast.codecs import FeatureCodec, Ranges, recipe
from narrowcast.engines import load_engine
from narrowcast.engines.transformers.sharding import local
from narrowcast.plan.split import UNCODED, Split
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.scores import Score, compare, log_probs

SUM = "int4-feature"
CODECS = ["int8-feature", "int4-feature", "int8-group128", "int4-group128", "fp8"]
NUM_CALIBRATION = 64
PROMPT = 1024  # tokens of a prompt, in the arithmetic


def measured(scorer: Scorer) -> Iterator[dict[str, Any]]:
    calibration = text("calibration.txt", NUM_CALIBRATION)
    for tp_size, sums in ((2, SUM), (4, SUM), (2, "bf16")):
        seen = observe(scorer.model, calibration, tp_size=tp_size)
        plain = seen.plan({"sum": sums})
        base = scorer.score(plain)
        setting = {"tp_size": tp_size, "sums": sums}
        yield {**setting, "form": "plain", "of": "both", **sent(seen, plain), **figures(base, base)}
        for codec in CODECS:
            for kinds in (UNCODED[:1], UNCODED[1:], UNCODED):
                plan = seen.plan({"sum": sums, **dict.fromkeys(kinds, codec)})
                of = kinds[0] if len(kinds) == 1 else "both"
                yield {**setting, "form": codec, "of": of, **sent(seen, plan), **figures(scorer.score(plan), base)}
        if sums == SUM:
            score, found = replicated(plain, scorer.batches)
            yield {**setting, "form": "replicated", "of": "both", **found, **figures(score, base)}


@torch.no_grad()
def clipped(scorer: Scorer) -> dict[str, float]:
    """The reason why static scales fail for logits: clipping by those of int8-feature alone, without any rounding."""
    seen = observe(scorer.model, text("calibration.txt", NUM_CALIBRATION), tp_size=2)
    (site,) = seen.plan({"logits": "int8-feature"}).sites.values()
    (codec,) = site.codecs[:1]
    assert isinstance(codec, FeatureCodec)
    reach_V = codec.scale[0].float() * 127
    reach_V[codec.outliers] = torch.inf
    num_top, kl = 0, 0.0
    for ids, expected in zip(scorer.batches, scorer.reference, strict=True):
        logits = scorer.model(input_ids=ids, use_cache=False).logits.float()
        top = logits.argmax(-1, keepdim=True)
        num_top += int((logits.gather(-1, top) > reach_V[top]).sum())
        kl += compare([expected], [logits.clamp(-reach_V, reach_V).log_softmax(-1)], [ids]).kl_nats * ids.numel()
    num_tokens = sum(ids.numel() for ids in scorer.batches)
    return {"likeliest_clipped": num_top / num_tokens, "kl_nats": kl / num_tokens}


def sent(seen: Observations, plan: Plan) -> dict[str, Any]:
    """Bytes a token and rank at embedding and logits."""
    kinds = {name: kind for name, kind in load_engine().sites(seen.model, seen.split).items() if kind in UNCODED}
    ids = seen.head[0][None]
    settings = {"decode": (ids[:, :1], 0), "prefill_last": (ids, 1), "prefill_all": (ids, 0)}
    found = {}
    for setting, (tokens, kept) in settings.items():
        with torch.no_grad(), narrowcast.attach(seen.model, plan, simulate=True) as handle:
            seen.model(input_ids=tokens, logits_to_keep=kept)
        sites = handle.report().sites
        found[setting] = {kind: sites[name].wire_bytes / tokens.numel() for name, kind in kinds.items()}
    return {"bytes_per_token": found}


def replicated(plan: Plan, batches: Sequence[Tensor]) -> tuple[Score, dict[str, Any]]:
    """The score on real ranks, and what they send and hold."""
    ranks.LIMIT_S = 600
    pool = ranks.Ranks(plan.tp_size)
    try:
        split = pool.run(held_bytes, plan.split, False)[0]
        whole = pool.run(held_bytes, plan.split, True)[0]
        score, uncoded = pool.run(score_replicated, plan.to_bytes(), batches)[0]
    finally:
        pool.close()
    assert not uncoded, uncoded
    nothing = dict.fromkeys(UNCODED, 0.0)
    bytes_per_token = dict.fromkeys(("decode", "prefill_last", "prefill_all"), nothing)
    return score, {"bytes_per_token": bytes_per_token, "weight_bytes": whole, "weight_bytes_if_split": split}


def held_bytes(split: Split, replicate: bool) -> int:
    """Bytes of weights that this rank holds, each storage once: tied matrices are one."""
    model = load_engine().load(MODEL, split=split, replicated="all" if replicate else "none")  # type: ignore[call-arg]
    held = {local(weight).untyped_storage().data_ptr(): local(weight).nbytes for weight in model.parameters()}
    return sum(held.values())


def score_replicated(plan: bytes, batches: Sequence[Tensor]) -> tuple[Score | None, Mapping[str, float]]:
    """On one rank: the score (of rank 0, which alone computes the reference), and bytes that were not coded."""
    loaded, engine = Plan.from_bytes(plan, "sent"), load_engine()
    model = engine.load(MODEL, split=loaded.split, replicated="all")  # type: ignore[call-arg]
    with narrowcast.attach(model, loaded) as handle:
        found = [log_probs(model, ids) for ids in batches]
    uncoded = handle.report().uncompressed_bytes_per_token
    if torch.distributed.get_rank():
        return None, uncoded
    whole = engine.load(MODEL)
    return compare((log_probs(whole, ids) for ids in batches), found, batches), uncoded


@dataclass(frozen=True)
class Shape:
    """A large model, as far as bytes go: two sums a layer."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_matrices: int  # 1 where embedding and output layer are tied


SHAPES = (Shape("Llama-2-13B", 32000, 5120, 40, 2), Shape("Gemma-2-27B", 256000, 4608, 46, 1))
FORMS = ["plain", "int8-group128", "int4-group128", "replicated"]


def by_arithmetic() -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)  # where outliers are: a block of features has more or fewer of them
    for shape in SHAPES:
        for tp_size in (2, 4, 8):
            sums = {num_tokens: 2 * shape.num_layers * summed(shape, SUM, tp_size, num_tokens) for num_tokens in (1, 8)}
            matrix = 2 * shape.vocab_size * shape.hidden_size
            for form in FORMS:
                preset = "bf16" if form == "plain" else form
                travels = form != "replicated"
                embedding = {n: summed(shape, preset, tp_size, n) if travels else 0.0 for n in (1, 8)}
                logits = gathered(shape, preset, tp_size) if travels else 0.0
                decode, prefill = (embedding[1], logits, sums[1]), (embedding[8], logits / PROMPT, sums[8])
                yield {
                    "shape": shape.name,
                    "tp_size": tp_size,
                    "form": form,
                    "decode": dict(zip((*UNCODED, "sum"), decode, strict=True)),
                    "prefill": dict(zip((*UNCODED, "sum"), prefill, strict=True)),
                    "share_decode": sum(decode[:2]) / sum(decode),
                    "share_prefill": sum(prefill[:2]) / sum(prefill),
                    "extra_bytes": 0 if travels else shape.num_matrices * matrix * (tp_size - 1) // tp_size,
                }


def summed(shape: Shape, preset: str, tp_size: int, num_tokens: int) -> float:
    """Bytes a token of one sum."""
    partials = torch.rand(tp_size, num_tokens, shape.hidden_size, dtype=torch.bfloat16)
    ranges = Ranges.of(partials), Ranges.of(partials[:1])
    sites = Sites({"": [recipe(preset).codec(seen) for seen in ranges]}, (), "auto", torch.device("cpu"))
    Simulator(sites, tp_size).sum(list(partials), "")
    return sites.report().sites[""].wire_bytes / num_tokens


def gathered(shape: Shape, preset: str, tp_size: int) -> float:
    """Bytes of one token's logits."""
    logits = torch.rand(1, shape.vocab_size, dtype=torch.bfloat16)
    codec = recipe(preset).codec(Ranges.of(logits[None]))
    sites = Sites({"": [codec]}, (), "auto", torch.device("cpu"))
    parts = logits.chunk(tp_size, dim=1)
    simulator = Simulator(sites, tp_size)
    simulator.column_parallel("", [part.shape[1] for part in parts])
    simulator.gather_features(parts, "")
    return float(sites.report().sites[""].wire_bytes)


def print_measured(row: dict[str, Any]) -> None:
    found = row["bytes_per_token"]
    cells = [" + ".join(f"{found[key][kind]:.0f}" for kind in UNCODED) for key in found]
    print(
        "| {tp_size} | `{sums}` | {form} | {of} | ".format(**row)
        + " | ".join(cells)
        + " | {kl_nats:.5f} ± {standard_error:.5f} | {added_kl_nats:+.5f} ± {added_standard_error:.5f} |"
        " {top1_agreement:.1%} |".format(**row),
        flush=True,
    )


def print_arithmetic(row: dict[str, Any]) -> None:
    cells = [" + ".join(f"{row[key][kind]:.0f}" for kind in (*UNCODED, "sum")) for key in ("decode", "prefill")]
    print(
        "| {shape} | {tp_size} | {form} | ".format(**row)
        + f"{cells[0]} | {row['share_decode']:.1%} | {cells[1]} | {row['share_prefill']:.1%} |"
        f" {row['extra_bytes'] / 2**20:.0f} |"
    )


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    arguments = parser.parse_args()
    scorer = Scorer.of(load_engine().load(MODEL), text("scoring.txt", arguments.sequences))
    rows, shapes = [], []
    print("Bytes: embedding + logits.\n")
    print("| TP | sums | form | of | decoding | prefill, last | prefill, all | KL, nats | more than plain | top-1 |")
    print("| ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in measured(scorer):
        rows.append(row)
        print_measured(row)
    clipping = clipped(scorer)
    print(
        "\nint8-feature clips the likeliest token's logit in {likeliest_clipped:.1%} of the positions; clipping alone"
        " makes the KL {kl_nats:.4f}".format(**clipping)
    )
    print(f"\nBytes: embedding + logits + sums at {SUM}; a prompt of {PROMPT} tokens has one row of logits.\n")
    print("| shape | TP | form | decoding | share | prefill | share | MiB more a rank |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in by_arithmetic():
        shapes.append(row)
        print_arithmetic(row)
    reporting.write(
        arguments.json, **setting_of(scorer.batches), rows=rows, int8_feature_clipping=clipping, shapes=shapes
    )


if __name__ == "__main__":
    main()
