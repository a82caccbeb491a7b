"""The matrices of the vocabulary that every rank keeps whole: where memory allows it and the link pays for it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast, get_args

import torch

from narrowcast.engines.base import Dtype, Engine, Replicated, Vocabulary, Weights
from narrowcast.plan import Plan
from narrowcast.plan.split import UNCODED
from narrowcast.transport import TorchDistributedTransport

# Of the memory that is free, what weights may take: caches, activations and other programs need the rest.
SHARE_OF_MEMORY = 0.5


class Files(NamedTuple):
    """Those of a control group that tell its limit and what is taken of it; what of that is files in the cache."""

    limit: str
    usage: str
    cached: Sequence[str]


OLD = Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
NEW = Files("memory.max", "memory.current", ("inactive_file", "active_file"))

ORDER: Sequence[Replicated] = get_args(Replicated)  # from the least


def affordable(
    engine: Engine,
    path: str | Path,
    plans: Sequence[Plan],
    *,
    dtype: Dtype = "auto",
    weights: Weights = "stored",
) -> Replicated:
    """The `replicated` of `load` that suits these `plans` of one split; every rank calls this, and finds the same.

    The embedding, where the weights then fill at most half of the memory that is free; the output layer too, where that
    holds as well and `tune` found that its logits take longer to gather than all of it takes to be read. Nothing that
    a plan codes.
    """
    skeleton = engine.skeleton(path)
    dense = engine.vocabulary(skeleton if dtype == "auto" else skeleton.to(getattr(torch, dtype)))
    vocabulary = dense.kept_in(engine.matrices(path, weights=weights)) if dtype != "float32" else dense
    mine = allowed(vocabulary, plans, free_nbytes(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    texts = TorchDistributedTransport().share(json.dumps(mine), "agreeing on what to replicate")
    every: list[Replicated] = [cast(Replicated, json.loads(text)) for text in texts]
    return min(every, key=ORDER.index)


def allowed(vocabulary: Vocabulary, plans: Sequence[Plan], free: int, num_ranks: int) -> Replicated:
    """The most that a rank may replicate that shares a machine with `free` bytes among `num_ranks`."""
    split, coded = plans[0].split, {site.kind for plan in plans for site in plan.sites.values()}

    def fits(replicated: Replicated) -> bool:
        held = vocabulary.all // split.world_size + vocabulary.added(replicated, split.tp_size)
        return num_ranks * held <= SHARE_OF_MEMORY * free

    if split.tp_size == 1 or UNCODED[0] in coded or not vocabulary.embedding or not fits("embedding"):
        return "none"
    more = vocabulary.output * (split.tp_size - 1) // split.tp_size
    pays = all(plan.decisions.output_layer_pays(more) for plan in plans)
    return "all" if pays and UNCODED[1] not in coded and fits("all") else "embedding"


def free_nbytes() -> int:
    """Bytes that the ranks of this machine may take: what is free of a GPU or of the machine, within their limits.

    0 where nothing tells: Linux does.
    """
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_host_nbytes()


def free_host_nbytes() -> int:
    """The same, whether there is a GPU or not."""
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(told["MemAvailable"].split()[0])
        return min([available, *limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    except (OSError, KeyError):
        return 0


def limits(own: Path, mounted: Path) -> Iterator[int]:
    """Bytes left in the control groups that this process is in, see cgroups(7): in the old kind's memory, or the new's.

    Files in the cache are not counted: they make room.
    """
    for line in own.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, kind = (mounted / controllers, OLD) if controllers else (mounted, NEW)
        group = top / name.lstrip("/")
        for folder in (group, *(each for each in group.parents if each.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max", none
                limit = int((folder / kind.limit).read_text())
                yield max(0, limit - _taken(folder, kind))


def _taken(folder: Path, kind: Files) -> int:
    """Bytes that a group has taken; 0 where nothing tells."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / kind.usage).read_text()) - sum(int(stat[name]) for name in kind.cached)
    except (OSError, ValueError, KeyError):
        return 0
