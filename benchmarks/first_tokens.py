"""What it costs when the first tokens of a sequence count, or do not count, in calibration.

usage: python benchmarks/first_tokens.py [--json FILE] MODEL...

Each model is calibrated and scored on text sampled from itself (temperature 1, a fixed seed each), at TP 2 and 8,
for every way of counting; so is a Llama with random weights, whose first tokens stick out most. Prints KL in nats
from the uncompressed model, with its standard error over sequences, and how much larger the first token's partial
sums are than those of tokens from 64 on (mean over ranks of the largest magnitude; the site where it is most).
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import narrowcast
from narrowcast.calibrate import FirstTokens
from narrowcast.cli.files import check_report, write_report
from narrowcast.evaluate import compare, log_probs
from narrowcast.integrations import load_engine
from narrowcast.integrations.forwards import split_virtually

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


def first_token_ratio(model: nn.Module, ids: Tensor, tp_size: int) -> float:
    """Largest over sites of (first token's magnitude) / (median magnitude of tokens from 64 on)."""
    ratios = []

    def reduce(partials: Sequence[Tensor], name: str) -> Tensor:
        magnitude_T = torch.stack(list(partials)).float().abs().amax(-1).mean((0, 1))
        ratios.append((magnitude_T[0] / magnitude_T[64:].median()).item())
        return torch.stack(list(partials)).float().sum(0).to(partials[0].dtype)

    forwards = split_virtually(load_engine().row_parallel_layers(model), tp_size, reduce)
    with torch.no_grad():
        model(ids)
    forwards.restore()
    return max(ratios)


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
            with narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
                found = [log_probs(model, ids) for ids in scoring]
                saturated = handle.report().num_saturated
            kl = [compare([r], [f], [ids]).kl_nats for r, f, ids in zip(reference, found, scoring, strict=True)]
            yield {
                "model": name,
                "first_token_ratio": ratio,
                "tp_size": tp_size,
                "algorithm": algorithm,
                "first_tokens": first_tokens,
                "num_first": num_first,
                "kl_nats": statistics.mean(kl),
                "standard_error": statistics.stdev(kl) / len(kl) ** 0.5,
                "saturated": saturated,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_report(arguments.json)
    table = []
    for row in itertools.chain.from_iterable(rows(*each) for each in models(arguments.models)):
        table.append(row)
        print("{model:16} ratio {first_token_ratio:4.1f}  TP {tp_size} {algorithm}  {first_tokens:8} {num_first:2}"
              "  KL {kl_nats:.5f} ± {standard_error:.5f}  saturated {saturated}".format(**row), flush=True)  # fmt: skip
    if arguments.json:
        write_report(arguments.json, {"command": "python benchmarks/first_tokens.py MODEL...", "rows": table})


if __name__ == "__main__":
    main()
