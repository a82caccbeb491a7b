"""Runs `vllm bench serve` against servers in turns, in a Python that has vLLM, and where the servers' first node is.

usage: PYTHON bench_vllm.py URL ... --tokenizer FOLDER --prompt N --decode N --prompts N --rounds N --at-once N
       --interface NAME

Prints JSON: for each server, of requests one at a time, seconds to the first token and between tokens of each, and
bytes that left by the interface for a prompt and for each token after it (null without that interface); of each round,
output tokens a second of these, and of twice as many requests as are at once.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

TRANSMITTED = 8  # the place of that figure in a line of /proc/net/dev


def bench(url: str, asked: argparse.Namespace, num_tokens: int, seed: int, at_once: int = 1) -> dict[str, Any]:
    """The figures of one run, each prompt of which is new to the server."""
    num_prompts = asked.prompts if at_once == 1 else 2 * at_once
    sizes = {"num-prompts": num_prompts, "random-input-len": asked.prompt, "random-output-len": num_tokens}
    options = {"base-url": url, "tokenizer": asked.tokenizer, "dataset-name": "random", "max-concurrency": at_once}
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    given = [f"--{name}={value}" for name, value in {**options, **sizes, "seed": seed, "temperature": 0}.items()]
    with contextlib.redirect_stdout(sys.stderr):
        found = serve.main(parser.parse_args([*given, "--ignore-eos", "--save-detailed", "--disable-tqdm"]))
    if found["completed"] != num_prompts or found["total_input_tokens"] != num_prompts * asked.prompt:
        raise SystemExit(f"{url} answered otherwise than asked: {found}")
    return found


def sent_bytes(interface: str) -> float:
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == interface:
            return int(figures.split()[TRANSMITTED])
    return math.nan


def counted(url: str, asked: argparse.Namespace, num_tokens: int, seed: int) -> tuple[dict[str, Any], float]:
    """The same, with the bytes of a request."""
    before = sent_bytes(asked.interface)
    found = bench(url, asked, num_tokens, seed)
    return found, (sent_bytes(asked.interface) - before) / asked.prompts


def measured(asked: argparse.Namespace) -> list[dict[str, Any]]:
    of_prompts: dict[str, float] = {}
    found: dict[str, dict[str, list[float]]] = {url: {} for url in asked.urls}
    for url in asked.urls:  # which warms up
        bench(url, asked, 2, seed=0)
        _, of_prompts[url] = counted(url, asked, 1, seed=1)
    for round in range(asked.rounds):
        for url in asked.urls:
            run, nbytes = counted(url, asked, asked.decode, seed=2 + round)
            figures = {
                "prompt_s": run["ttfts"],
                "token_s": [sum(itls) / (asked.decode - 1) for itls in run["itls"]],
                "tokens_per_s": [run["output_throughput"]],
                "bytes_per_token": [(nbytes - of_prompts[url]) / (asked.decode - 1)],
            }
            together = bench(url, asked, asked.decode, seed=2 + asked.rounds + round, at_once=asked.at_once)
            figures["tokens_per_s_at_once"] = [together["output_throughput"]]
            for name, values in figures.items():
                found[url].setdefault(name, []).extend(values)
    return [{**figures, "bytes_of_prompt": [of_prompts[url]]} for url, figures in found.items()]


def without_nan(figures: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    return {name: [None if math.isnan(each) else each for each in values] for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--interface", required=True)
    for name in ("--prompt", "--decode", "--prompts", "--rounds", "--at-once"):
        parser.add_argument(name, type=int, required=True)
    print(json.dumps([without_nan(each) for each in measured(parser.parse_args())]))


if __name__ == "__main__":
    main()
