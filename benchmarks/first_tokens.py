"""The cost of first tokens of a sequence that count, or do not count, in calibration.

usage: python benchmarks/first_tokens.py [--json FILE] [--plot FILE.png] [MODEL...]

Each model (the bundled one) is calibrated and scored on text sampled from itself (temperature 1, a fixed seed each),
at TP 2 and 8, for every way of counting; so is a Llama with random weights, whose first tokens stick out most.
Prints KL in nats from the uncompressed model, with its standard error over sequences, and how much larger the first
token's partial sums are than those of tokens from 64 on (mean over ranks of the largest magnitude; the site where it is
most).
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import reporting
import torch
from scoring import MODEL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import narrowcast
from narrowcast.calibration.observers import FirstTokens
from narrowcast.calibration.observing import observed
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.plan.split import Split
from narrowcast.scores import log_probs

RANDOM = LlamaConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip


def models(paths: Sequence[Path]) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, model, and the token ids that its samples start with."""
    engine = load_engine()
    for path in paths:
        start = engine.load_tokenizer(path)("\n", return_tensors="pt").input_ids[:, -1:]
        yield (path.parent.name if path.name == "hf" else path.name), engine.load(path), start
    torch.manual_seed(0)
    yield "random weights", AutoModelForCausalLM.from_config(RANDOM).eval(), torch.tensor([[5]])


def sample(model: nn.Module, start: Tensor, seed: int, num_sequences: int) -> Tensor:
    torch.manual_seed(seed)
    model.generation_config.eos_token_id = None
    length = min(256, model.config.max_position_embeddings)
    ids = start.expand(num_sequences, -1)
    return model.generate(ids, max_length=length, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)


class Magnitudes:
    """Ratios by site of the first token's magnitude over the median of tokens from 64 on."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape  # sequences, tokens
        self.ratios: dict[str, float] = {}

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        magnitude_T = torch.stack(list(partials)).view(len(partials), *self.shape, -1).float().abs().amax(-1)
        magnitude_T = magnitude_T.mean((0, 1))
        self.ratios[site] = (magnitude_T[0] / magnitude_T[64:].median()).item()

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Columns are no sum."""

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Nor is what travels once."""


def first_token_ratio(model: nn.Module, ids: Tensor, tp_size: int) -> float:
    """The largest ratio over the sums."""
    split, seen = Split(tp_size=tp_size), Magnitudes(ids.shape)
    with observed([seen], model, split), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    kinds = load_engine().sites(model, split)
    return max(ratio for site, ratio in seen.ratios.items() if kinds[site] == "sum")


def rows(name: str, model: nn.Module, start: Tensor) -> Iterator[dict[str, Any]]:
    calibration, scoring = sample(model, start, 0, 128), sample(model, start, 1, 32).split(1)
    reference = [log_probs(model, ids) for ids in scoring]
    ways = [("count", 0), *itertools.product(get_args(FirstTokens)[1:], (1, 4, 16))]
    for tp_size, (first_tokens, num_first) in itertools.product((2, 8), ways):
        ratio = first_token_ratio(model, calibration[:16], tp_size)
        plan = narrowcast.calibrate(
            model, [calibration], tp_size=tp_size, first_tokens=first_tokens, num_first=num_first
        )
        for algorithm in ("one_shot", "two_shot"):
            found = evaluate(model, plan, scoring, algorithm=algorithm, reference=reference)
            score, report = found.score, found.report
            yield {
                "model": name,
                "first_token_ratio": ratio,
                "tp_size": tp_size,
                "algorithm": algorithm,
                "first_tokens": first_tokens,
                "num_first": num_first,
                "kl_nats": score.kl_nats,
                "standard_error": score.by_sequence["kl_nats"].standard_error,
                "saturated": report.num_saturated,
            }


def draw(table: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a model: KL of each way of counting over that of counting every token, TP 8."""
    from matplotlib.figure import Figure

    table = [row for row in table if row["tp_size"] == 8]
    names = list(dict.fromkeys(row["model"] for row in table))
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for algorithm, color in (("one_shot", "tab:blue"), ("two_shot", "tab:orange")):
            of_model = [row for row in table if (row["model"], row["algorithm"]) == (name, algorithm)]
            base = of_model[0]["kl_nats"]
            for way, style in (("choosing", "o--"), ("skip", "s-")):
                points = [of_model[0]] + [row for row in of_model if row["first_tokens"] == way]
                axes.errorbar(
                    [str(row["num_first"]) for row in points],
                    [row["kl_nats"] / base for row in points],
                    [row["standard_error"] / base for row in points],
                    fmt=style, color=color, label=f"{algorithm}, {way}", capsize=2, markersize=4, linewidth=1,
                )  # fmt: skip
        axes.axhline(1, color="gray", linewidth=0.5)
        axes.set_title(f"{name}\n(first token {of_model[0]['first_token_ratio']:.0f}x)", fontsize=9)
        axes.set_xlabel("first tokens left out")
    figure.axes[0].set_ylabel("KL / KL when all count")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", default=[MODEL])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    table = []
    for row in itertools.chain.from_iterable(rows(*each) for each in models(arguments.models)):
        table.append(row)
        print("{model:16} ratio {first_token_ratio:4.1f}  TP {tp_size} {algorithm}  {first_tokens:8} {num_first:2}"
              "  KL {kl_nats:.5f} ± {standard_error:.5f}  saturated {saturated}".format(**row), flush=True)  # fmt: skip
    reporting.write(arguments.json, rows=table)
    if arguments.plot:
        draw(table, arguments.plot)


if __name__ == "__main__":
    main()
