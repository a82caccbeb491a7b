"""What decoding costs on a CPU beside products, and where our attention of few queries beats PyTorch's.

usage: python benchmarks/decoding.py [--json FILE] [--threads N] [--rounds N] [--linears]

A Llama of 510 M random weights (hidden 2048, 8 layers, 16 heads of 128, vocabulary 32,000) in BF16 continues prompts by
`model.generate`; its linear layers are left out, unless --linears. Ways take turns: Transformers as it is (SDPA), our
attention, and our forwards for decoding steps besides. Several prompts go on together by `model.generate_batch`, whose
attention is paged, with SDPA and with ours. Prints ms a token, medians and minima: other work on the machine moves
medians.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import reporting
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from narrowcast.codecs.kernels import cpu, selected
from narrowcast.engines.transformers.decoding import choose, shorten_steps
from narrowcast.runtime.attention import attend

CONTEXTS = 16, 128, 512, 1024
WAYS = "sdpa", "attention", "steps"
NUM_TOKENS, NUM_FIRST = 40, 4  # the first ones find cold caches
TOGETHER, PROMPT, PAGE = (1, 8, 16), 480, 32
# Sequences, heads, heads of keys, values of a head, keys.
SHAPES = (1, 16, 16, 128, 512), (1, 32, 8, 128, 2048), (4, 16, 4, 64, 512), (32, 16, 16, 128, 256)
QUERIES = 1, 2, 4, 8, 16, 32, 64


class NoProduct(nn.Module):
    """Values of the right size in place of a product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.one = 0.1 * torch.randn(1, 1, linear.out_features, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.one.expand(*x.shape[:-1], -1).contiguous()


class Times:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _: Tensor) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


def make(*, linears: bool) -> Any:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=4992,
        num_hidden_layers=8,
        num_attention_heads=16,
        head_dim=128,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    if not linears:
        for module in list(model.modules()):
            for name, layer in module.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(module, name, NoProduct(layer))
    return model


def tokens_of(model: Any, way: str, context: int) -> list[float]:
    """Seconds from one token to the next."""
    model.set_attn_implementation("sdpa")
    if way != "sdpa":
        choose(model)
    forwards = shorten_steps(model) if way == "steps" else None
    times, ids = Times(), torch.randint(0, 32000, (1, context))
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, streamer=times
        )
    if forwards is not None:
        forwards.restore()
    return [after - before for before, after in itertools.pairwise(times.seen[NUM_FIRST:])]


def steps(rounds: int, *, linears: bool) -> Iterator[reporting.Row]:
    model = make(linears=linears)
    seconds: dict[tuple[int, str], list[float]] = {}
    for _, context, way in itertools.product(range(rounds), CONTEXTS, WAYS):
        seconds.setdefault((context, way), []).extend(tokens_of(model, way, context))
    for (context, way), found in seconds.items():
        yield {"context": context, "way": way, "ms": 1e3 * statistics.median(found), "ms_min": 1e3 * min(found)}


def tokens_of_batch(model: Any, way: str, num_sequences: int) -> list[float]:
    """Seconds from one token of all sequences to their next."""
    model.set_attn_implementation("sdpa")
    if way != "sdpa":
        choose(model)
    num_tokens = NUM_TOKENS + 2 * num_sequences  # while prompts of others are read, too
    pages = 2 * num_sequences * -(-(PROMPT + num_tokens) // PAGE)  # with half as many sequences wait for each other
    found = model.generate_batch(
        inputs=torch.randint(0, 32000, (num_sequences, PROMPT)).tolist(),
        generation_config=GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=pages, page_size=PAGE, max_batch_tokens=512),
        record_timestamps=True,
    )
    times = [each.timestamps for each in found.values()]
    begin, end = max(each[NUM_FIRST] for each in times), min(each[-1] for each in times)
    return [after - before for before, after in itertools.pairwise(times[-1]) if begin <= before and after <= end]


def batches(rounds: int, *, linears: bool) -> Iterator[reporting.Row]:
    model = make(linears=linears)
    seconds: dict[tuple[int, str], list[float]] = {}
    for _, num_sequences, way in itertools.product(range(rounds), TOGETHER, WAYS[:2]):
        seconds.setdefault((num_sequences, way), []).extend(tokens_of_batch(model, way, num_sequences))
    for (num_sequences, way), found in seconds.items():
        row = {"ms": 1e3 * statistics.median(found), "ms_min": 1e3 * min(found)}
        yield {"sequences": num_sequences, "way": way, **row}


def fastest(run: Callable[[], object], repeats: int = 9) -> float:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def pytorchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As Transformers calls it."""
    group = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:
        return functional.scaled_dot_product_attention(q.view(len(q), k.shape[1], group, q.shape[3]), k, v)
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask)


def crossing() -> Iterator[reporting.Row]:
    """Our attention and PyTorch's, ms a layer, with a causal mask."""
    for (num_sequences, num_heads, num_kv_heads, head_dim, context), num_queries in itertools.product(SHAPES, QUERIES):
        q = torch.randn(num_sequences, num_heads, num_queries, head_dim).bfloat16()
        k, v = torch.randn(2, num_sequences, num_kv_heads, context, head_dim).bfloat16()
        mask = torch.ones(num_sequences, 1, num_queries, context, dtype=torch.bool).tril(context - num_queries)
        ours = fastest(functools.partial(attend, q, k, v, scale=head_dim**-0.5, mask=mask))
        yield {
            "shape": f"{num_sequences} x {num_heads}/{num_kv_heads} x {head_dim}, {context} keys",
            "queries": num_queries,
            "ours_ms": ours,
            "pytorch_ms": fastest(functools.partial(pytorchs, q, k, v, mask)),
        }


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--linears", action="store_true", help="with linear layers in BF16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu.limit_threads()
    given = {"rounds": arguments.rounds, "linears": arguments.linears}
    tables: dict[str, list[reporting.Row]] = {"steps": [], "batches": [], "crossing": []}
    for name, rows in zip(tables, (steps(**given), batches(**given), crossing()), strict=True):
        for row in rows:
            tables[name].append(row)
            print("  ".join(f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in row.values()))
    reporting.write(arguments.json, threads=arguments.threads, linears=arguments.linears, kernels=selected(), **tables)


if __name__ == "__main__":
    main()
