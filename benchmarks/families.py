"""Families of models x ways to split them x codecs: real ranks against the simulation, bit for bit.

usage: python benchmarks/families.py [--json FILE] [--odd] [--seed N] [FAMILY...]

Small models with random weights in bf16 (the configs of tests/models.py: run this from a clone), every kind of site
coded, gloo ranks on this machine. Compared with the one-process simulation: logits of a batch (padded on the left
where there is no pipeline), a greedy continuation, and the bytes that each site sends. `--odd` takes shapes that
nothing divides instead, on 3, 5 and 6 ranks too. Prints a table whose cells count codecs, equal of run, and then
every case that was not equal, with its numbers.
"""

import functools
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import reporting
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MixtralConfig, Olmo2Config, Phi3Config, Qwen3MoeConfig
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import narrowcast
from models import CONFIGS, SMALL, random_ids, save_random
from narrowcast import NarrowcastError, Plan
from narrowcast.calibration import Observations, observe
from narrowcast.engines import load_engine
from narrowcast.plan.split import KINDS, Split
from narrowcast.runtime.reports import Report
from ranks import Ranks

CODECS = [
    "bf16",
    "int4-feature",
    "int4-group32-sym",
    "int4-group128",
    "fp8",
    "mxfp4",
    "nvfp4",
    "int2-group32-spike",
]
SPLITS = {
    "TP 2": Split(tp_size=2),
    "TP 4": Split(tp_size=4),
    "EP 2, sums": Split(tp_size=2, experts="all_reduce"),
    "EP 2, travel": Split(tp_size=2, experts="all_to_all"),
    "PP 2": Split(pp_size=2),
    "PP 2 x TP 2": Split(tp_size=2, pp_size=2),
}
ODD_SPLITS = {
    "TP 3": Split(tp_size=3),
    "TP 5": Split(tp_size=5),
    "TP 6": Split(tp_size=6),
    "EP 3, sums": Split(tp_size=3, experts="all_reduce"),
    "EP 3, travel": Split(tp_size=3, experts="all_to_all"),
    "PP 3": Split(pp_size=3),
    "PP 2 x TP 3": Split(tp_size=3, pp_size=2),
}
HEADS_6 = SMALL | {"hidden_size": 102, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 18}
HEADS_30 = SMALL | {"hidden_size": 90, "num_attention_heads": 30, "num_key_value_heads": 30, "head_dim": 6}
EXPERTS_6 = HEADS_6 | {"intermediate_size": 40, "num_key_value_heads": 3}
ODD: dict[str, Callable[[], Any]] = {
    "llama, 6 heads": lambda: LlamaConfig(**HEADS_6),
    "llama, 6 heads of 3 keys": lambda: LlamaConfig(**HEADS_6 | {"num_key_value_heads": 3}, attention_bias=True),
    "llama, 30 heads": lambda: LlamaConfig(**HEADS_30 | {"intermediate_size": 139}),
    "llama, 30 heads, tied": lambda: LlamaConfig(**HEADS_30, tie_word_embeddings=True),
    "llama, 5 layers": lambda: LlamaConfig(**HEADS_6 | {"num_hidden_layers": 5}),
    "gemma2, 6 heads": lambda: Gemma2Config(**HEADS_6, query_pre_attn_scalar=18, sliding_window=6),
    "phi3, 6 heads": lambda: Phi3Config(
        **SMALL | {"hidden_size": 108, "num_attention_heads": 6, "num_key_value_heads": 6}, resid_pdrop=0.0
    ),
    "olmo2, 30 heads": lambda: Olmo2Config(**HEADS_30),
    "mixtral, 6 experts": lambda: MixtralConfig(**EXPERTS_6, num_local_experts=6, num_experts_per_tok=2),
    "mixtral, aligned": lambda: MixtralConfig(
        **EXPERTS_6 | {"hidden_size": 96, "intermediate_size": 48}, num_local_experts=6, num_experts_per_tok=2
    ),
    "qwen3-moe, 6 experts": lambda: Qwen3MoeConfig(
        **EXPERTS_6, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40, mlp_only_layers=[0]
    ),
}

transformers = load_engine()


def answers(model: Any, plan: Plan, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor, Report]:
    """Logits, a greedy continuation, and what was sent for the logits."""
    with torch.no_grad(), narrowcast.attach(model, plan, **options) as handle:
        logits = model(input_ids=ids, attention_mask=mask).logits
        report = handle.report()
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return logits, text, report


@functools.lru_cache(maxsize=1)  # one model serves all codecs
def load(folder: Path, split: Split) -> Any:
    logging.set_verbosity_error()
    return transformers.load(folder, split=split)


def on_rank(folder: Path, plan: bytes, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Report]:
    loaded = Plan.from_bytes(plan, "sent")
    return answers(load(folder, loaded.split), loaded, ids, mask)


class Pools(dict[int, Ranks]):
    """Rank processes by their number; a world in which a rank raised is replaced."""

    def __missing__(self, world_size: int) -> Ranks:
        self[world_size] = Ranks(world_size)
        return self[world_size]

    def close(self, *world_sizes: int) -> None:
        for world_size in world_sizes or list(self):
            self.pop(world_size).close()


def differences(
    split: Split, expected: tuple[Tensor, Tensor, Report], found: Sequence[tuple[Tensor, Tensor, Report]]
) -> list[str]:
    """Differences between the simulation and the ranks, in words; none if they are equal."""
    logits, text, simulated = expected
    lines = []
    for rank, (theirs, continued, _) in enumerate(found):
        if not torch.equal(theirs, logits):
            far = (theirs.float() - logits.float()).abs()
            lines.append(
                f"rank {rank}: {int((far > 0).sum())} of {far.numel()} logits, in {int((far > 0).any(-1).sum())} of"
                f" {far[..., 0].numel()} tokens, differ by {far.max():.3g} at most (logits up to"
                f" {logits.float().abs().max():.3g})"
            )
        if not torch.equal(continued, text):
            lines.append(f"rank {rank}: {int((continued != text).sum())} tokens of the continuation differ")
    for name, site in simulated.sites.items():
        sent = [report.sites[name] for *_, report in found if name in report.sites]
        senders = [each for each in sent if each.wire_bytes] if split.pp_size > 1 else []
        first = (senders or sent)[0].counting(sent)  # rank 0 of the stage that sends; clipping on all ranks
        if first != site:
            lines.append(f"{name}: {first} instead of {site}")
    return lines


def run(pool: Ranks, folder: Path, seen: Observations, plan: Plan) -> tuple[float, list[str]]:
    """Bytes a token that rank 0 sends, and differences."""
    split = plan.split
    ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    if split.pp_size == 1:  # Transformers masks padding wrongly in a pipeline
        mask[1, :4] = 0
    pool.start(on_rank, folder, plan.to_bytes(), ids, mask)
    expected = answers(seen.model, plan, ids, mask, simulate=True)
    found = [pool.result(rank) for rank in range(split.world_size)]
    return found[0][2].wire_bytes_per_token, differences(split, expected, found)


def cell(pools: Pools, folder: Path, split: Split, codecs: Sequence[str]) -> dict[str, Any]:
    """One model split in one way: every codec's bytes a token, and what was not equal."""
    wire_bytes, unequal, start = {}, {}, time.monotonic()
    try:
        seen = observe(
            transformers.load(folder),
            [random_ids(8, 40, seed=1)],
            tp_size=split.tp_size,
            pp_size=split.pp_size,
            experts=split.experts,
        )
    except NarrowcastError as error:
        return {"refused": str(error), "unequal": {}}
    for codec in codecs:
        try:
            plan = seen.plan(dict.fromkeys(KINDS, codec))
            wire_bytes[codec], lines = run(pools[split.world_size], folder, seen, plan)
        except (NarrowcastError, TimeoutError) as error:
            pools.close(split.world_size)
            lines = [str(error)]
        except Exception:
            pools.close(split.world_size)  # the ranks may still be at it
            lines = [traceback.format_exc()]
        if lines:
            unequal[codec] = lines
    seconds = round(time.monotonic() - start, 1)
    return {"wire_bytes_per_token": wire_bytes, "unequal": unequal, "seconds": seconds}


def fits(name: str, split: Split) -> bool:
    """True where the model can be split so: by whole heads, and by whole experts if it has any."""
    config = CONFIGS[name]()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", 0)
    if split.experts != "slices" and (not experts or experts % split.tp_size):
        return False
    return config.num_key_value_heads % split.tp_size == 0 and config.num_hidden_layers >= split.pp_size


def rows(families: Sequence[str], splits: dict[str, Split], seed: int) -> Iterator[dict[str, Any]]:
    pools = Pools()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in families:
                path = save_random(name, Path(folder) / name, seed=seed)
                for label, split in splits.items():
                    if fits(name, split):
                        yield {"family": name, "split": label, **cell(pools, path, split, CODECS)}
    finally:
        pools.close()


def markdown(table: Sequence[dict[str, Any]], splits: Sequence[str]) -> str:
    cells = {(row["family"], row["split"]): row for row in table}
    families = list(dict.fromkeys(row["family"] for row in table))
    lines = ["| family | " + " | ".join(splits) + " |", "| --- |" + " ---: |" * len(splits)]
    for name in families:
        found = [cells.get((name, label)) for label in splits]
        lines.append(f"| {name} | " + " | ".join("" if row is None else _count(row) for row in found) + " |")
    return "\n".join(lines)


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its bytes in the order of the codecs."""
    sent = row.get("wire_bytes_per_token", {})
    return {**row, "wire_bytes_per_token": [sent.get(codec) for codec in CODECS]}


def _count(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "refused"
    return f"{len(CODECS) - len(row['unequal'])}/{len(CODECS)}"


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--odd", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the ranks compute
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    families, splits = arguments.families or list(ODD if arguments.odd else CONFIGS), SPLITS
    if arguments.odd:
        CONFIGS.update(ODD)
        splits = ODD_SPLITS
    table = []
    for row in rows(families, splits, arguments.seed):
        table.append(row)
        print(f"{row['family']:24} {row['split']:12} {_count(row)}  {row.get('seconds', 0)} s", file=sys.stderr)
    print(markdown(table, list(splits)))
    for row, (codec, lines) in itertools.chain.from_iterable(
        zip(itertools.repeat(row), row["unequal"].items(), strict=False) for row in table
    ):
        print(f"\n{row['family']}, {row['split']}, {codec}:", *lines, sep="\n  ")
    for row in table:
        if "refused" in row:
            print(f"\n{row['family']}, {row['split']}: {row['refused']}")
    reporting.write(arguments.json, codecs=CODECS, seed=arguments.seed, rows=[*map(_kept, table)])


if __name__ == "__main__":
    main()
