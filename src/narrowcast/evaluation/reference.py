"""The uncompressed model beside the ranks of a split one: whole on the first rank, where that fits."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from narrowcast.engines import Dtype, Weights, device_of, load_engine
from narrowcast.launch.alone import alone, cores_of_host, with_cores
from narrowcast.scores import log_probs
from narrowcast.transport import TorchDistributedTransport

T = TypeVar("T")

MEMORY = Path("/proc/meminfo")
SHARE = 0.8  # of the memory that is available; the rest is for what the ranks compute


class Reference:
    """The model of folder or hub name `path`, uncompressed, for ranks that hold a `part` each; all of them make one.

    `dtype`, `weights`: in which the parts were loaded.

    `kind`: "whole", a model of the first rank's own, if its weights take at most `SHARE` of the memory that is
    available once all parts are loaded; otherwise "split", the parts with the engine's own communication.
    """

    kind: Literal["whole", "split"]

    def __init__(self, path: str, part: nn.Module, dtype: Dtype = "auto", weights: Weights = "stored") -> None:
        self._ranks = TorchDistributedTransport()
        self._first = self._ranks.rank == 0
        self._part, device = part, device_of(part)
        fits = "yes" if self._first and _fits(path, device) else "no"
        fits, *_ = self._ranks.share(fits, "choosing a reference")
        self.kind = "whole" if fits == "yes" else "split"
        self._whole: nn.Module | None = None
        if self.kind == "whole":
            engine = load_engine()
            self._whole = self._on_first(lambda: engine.load(path, device=str(device), dtype=dtype, weights=weights))

    def ask(self, question: Callable[[nn.Module], T]) -> T | None:
        """The uncompressed model's answer, on the first rank; None on the others, which wait for it."""
        if self.kind == "split":
            answer = question(self._part)
            return answer if self._first else None
        return self._on_first(lambda: self._answer_alone(question))

    def _answer_alone(self, question: Callable[[nn.Module], T]) -> T:
        assert self._whole is not None, "the first rank has the whole model"
        with with_cores(cores_of_host()):
            return question(self._whole)

    def _on_first(self, call: Callable[[], T]) -> T | None:
        """The result of `call` on the first rank, which may take any time; None on the others, which wait for it."""
        return alone(self._ranks, call, "waiting for the uncompressed model")

    def log_probs(self, batches: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Log-probabilities [B, T, V] of each batch of ids [B, T], computed when it is asked for."""
        for ids in batches:
            yield self.ask(functools.partial(log_probs, ids=ids))


def _fits(path: str, device: torch.device) -> bool:
    nbytes = sum(weight.numel() * weight.element_size() for weight in load_engine().skeleton(path).parameters())
    return nbytes <= SHARE * _available_nbytes(device)


def _available_nbytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = (line.split() for line in MEMORY.read_text(encoding="ascii").splitlines())
    return next(1024 * int(size) for name, size, *_ in lines if name == "MemAvailable:")
