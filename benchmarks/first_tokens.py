"""What it costs when the first tokens of a sequence count, or do not count, in calibration.

usage: python benchmarks/first_tokens.py [--json FILE] MODEL...

Each model is calibrated and scored on text sampled from itself (temperature 1, a fixed seed each), at TP 2 and 8,
for every way of counting. Prints KL in nats from the uncompressed model, with its standard error over sequences.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import narrowcast
from narrowcast.calibrate import FirstTokens
from narrowcast.evaluate import compare, log_probs
from narrowcast.integrations import load_engine


def sample(model: nn.Module, tokenizer: Any, seed: int, num_sequences: int) -> Tensor:
    torch.manual_seed(seed)
    start = tokenizer("\n", return_tensors="pt").input_ids[:, -1:]
    length = min(256, model.config.max_position_embeddings)
    return model.generate(
        start.expand(num_sequences, -1), max_length=length, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip


def rows(path: Path) -> Iterator[dict[str, Any]]:
    engine = load_engine()
    model, tokenizer = engine.load(path), engine.load_tokenizer(path)
    model.generation_config.eos_token_id = None
    calibration, scoring = sample(model, tokenizer, 0, 128), sample(model, tokenizer, 1, 32).split(1)
    reference = [log_probs(model, ids) for ids in scoring]
    ways = [("count", 0), *itertools.product(get_args(FirstTokens)[1:], (1, 4, 16))]
    for tp_size, (first_tokens, num_first) in itertools.product((2, 8), ways):
        plan = narrowcast.calibrate(
            model, [calibration], tp_size=tp_size, first_tokens=first_tokens, num_first=num_first
        )
        for algorithm in ("one_shot", "two_shot"):
            with narrowcast.attach(model, plan, simulate=True, algorithm=algorithm) as handle:
                found = [log_probs(model, ids) for ids in scoring]
                saturated = handle.report().num_saturated
            kl = [compare([r], [f], [ids]).kl_nats for r, f, ids in zip(reference, found, scoring, strict=True)]
            yield {
                "model": path.parent.name if path.name == "hf" else path.name,
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
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = []
    for row in itertools.chain.from_iterable(map(rows, arguments.models)):
        table.append(row)
        print("{model:18} TP {tp_size} {algorithm:8} {first_tokens:8} {num_first:3}  KL {kl_nats:.5f}"
              " ± {standard_error:.5f}  saturated {saturated}".format(**row), flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
