"""How fast a packed model answers that is larger than memory, and what it reads of the disk for each token.

usage: python benchmarks/larger_than_memory.py [--json FILE] [--share S] [--threads N] [--rounds N]    (root)

A packed Llama of 4.5 G random weights in 4 bits (hidden 3584, 28 layers, vocabulary 32,000; 2.8 GB) answers in a
process of its own: with all memory ("all"); in a control group, of version 1, with a limit of S (0.5) of the file's
size, as it is loaded ("streamed": some layers stay, others are read ahead and dropped), and without that ("mapped": the
system reads and drops as it sees fit). Ways take turns; the file is not cached before each. Prints tokens a second, GB
that a token reads, and GB a second.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import reporting
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrowcast.engines import load_engine
from narrowcast.engines.transformers.files import packed
from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.folders.kernels import METHOD, VERSION
from narrowcast.weights.formats import Q4_0, Q8_0, GroupedCodes, WeightFormat
from narrowcast.weights.mapped import MappedFile

GROUPS = Path("/sys/fs/cgroup/memory")
WAYS = "all", "streamed", "mapped"
NUM_FIRST, NUM_TOKENS = 4, 16  # the first ones find layers that stay not there yet
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 3584,
    "intermediate_size": 9728,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 28,
}


class RandomWeights:
    """A `Checkpoint` of matrices in 4 bits, the output layer in 8, and of norms."""

    notes = ()

    def __init__(self, config: LlamaConfig) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(config)
        self._shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        self.names = self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def format(self, name: str) -> WeightFormat | None:
        if "embed" in name or "norm" in name:
            return None
        return Q8_0 if "lm_head" in name else Q4_0

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        form, shape = self.format(name), self._part(name, rows, columns)
        codes = torch.randint(0, 1 << form.num_bits, shape, dtype=torch.uint8)
        scales = torch.full(form.scales_shape(*shape), 0.2 / (1 << form.num_bits)).half()
        return GroupedCodes(form, codes, scales)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        if self.format(name):
            return self.codes(name, rows, columns).dequantized()
        shape = self._part(name, rows, columns)
        return (torch.ones if "norm" in name else torch.randn)(shape).bfloat16()

    def _part(self, name: str, *parts: slice) -> tuple[int, ...]:
        return tuple(len(range(*part.indices(size))) for size, part in zip(self._shapes[name], parts, strict=False))


def write_model(folder: Path) -> None:
    config = LlamaConfig(**SIZES, eos_token_id=None)
    packed.PackedModel(folder, RandomWeights(config), "stored").write(config, folder / "model.safetensors")
    config.quantization_config = {"quant_method": METHOD, "version": VERSION}
    config.save_pretrained(folder)


def answer(folder: Path, way: str, threads: int) -> reporting.Row:
    """What a process finds that loads the model and says some tokens."""
    torch.set_num_threads(threads)
    if way == "mapped":
        packed.stream = lambda *_: None
    model = load_engine().load(folder)
    torch.manual_seed(0)
    seen: list[tuple[float, int]] = []
    with torch.inference_mode():
        out, ids = None, torch.randint(0, 32000, (1, 8))
        for _ in range(NUM_FIRST + NUM_TOKENS):
            out = model(ids, past_key_values=out and out.past_key_values, use_cache=True)
            ids = out.logits[:, -1:].argmax(-1)
            seen.append((time.perf_counter(), _bytes_read()))
    (start, before), (end, after) = seen[NUM_FIRST - 1], seen[-1]
    return {
        "seconds": (end - start) / NUM_TOKENS,
        "nbytes": (after - before) / NUM_TOKENS,
        "logits": out.logits.sum().item(),
    }


def _bytes_read() -> int:
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["read_bytes"])


@contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """A control group with a limit of memory."""
    group = GROUPS / f"narrowcast-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        yield group
    finally:
        group.rmdir()


def measured(folder: Path, way: str, share: float, threads: int) -> reporting.Row:
    file = folder / "model.safetensors"
    mapped = MappedFile(file)
    mapped.forget(mapped.bytes)
    with nullcontext() if way == "all" else limited(int(share * file.stat().st_size)) as group:
        enter = "" if group is None else f"echo $$ > {group}/cgroup.procs; "
        command = [sys.executable, __file__, "--answer", folder, "--way", way, "--threads", threads]
        told = subprocess.run(
            ["sh", "-c", f'{enter}exec "$@"', "sh", *map(str, command)], check=True, capture_output=True, text=True
        ).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", type=Path, help="for its own use")
    parser.add_argument("--way", choices=WAYS, help="for its own use")
    asked = parser.parse_args()
    if asked.answer:
        print(json.dumps(answer(asked.answer, asked.way, asked.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        found = {way: [] for way in WAYS}
        for _ in range(asked.rounds):
            for way in WAYS:
                found[way].append(measured(folder, way, asked.share, asked.threads))
                print(way, found[way][-1], flush=True)
        size = (folder / "model.safetensors").stat().st_size
    assert len({each["logits"] for rounds in found.values() for each in rounds}) == 1, "the same answers"
    rows: list[reporting.Row] = []
    for way, rounds in found.items():
        seconds, nbytes = (statistics.median(each[key] for each in rounds) for key in ("seconds", "nbytes"))
        rows.append(
            {"way": way, "tokens_per_s": 1 / seconds, "gb_per_token": nbytes / 1e9, "gb_per_s": nbytes / 1e9 / seconds}
        )
        print("  ".join(f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in rows[-1].values()))
    reporting.write(asked.json, size_gb=size / 1e9, share=asked.share, threads=asked.threads, ways=rows)


if __name__ == "__main__":
    main()
