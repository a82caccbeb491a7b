"""The uncompressed model beside the ranks of a split one: whole on the first rank, where that fits."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from narrowcast.engines import Dtype, device_of, load_engine
from narrowcast.scores import log_probs
from narrowcast.transport import DEFAULT_TIMEOUT_S, TorchDistributedTransport
from narrowcast.transport.torch_distributed import ENGINE_TIMEOUT

T = TypeVar("T")

MEMORY = Path("/proc/meminfo")
SHARE = 0.8  # of the memory that is available; the rest is for what the ranks compute


class Reference:
    """The model of folder or hub name `path`, uncompressed, for ranks that hold a `part` each; all of them make one.

    `dtype`: in which the parts were loaded.

    `kind`: "whole", a model of the first rank's own, if its weights take at most `SHARE` of the memory that is
    available once all parts are loaded; otherwise "split", the parts with the engine's own communication.
    """

    kind: Literal["whole", "split"]

    def __init__(self, path: str, part: nn.Module, dtype: Dtype = "auto") -> None:
        # Whoever waits for the first rank's model waits as for the engine, not as for a payload.
        self._ranks = TorchDistributedTransport(timeout_s=ENGINE_TIMEOUT.total_seconds())
        self._first = self._ranks.rank == 0
        self._part, device = part, device_of(part)
        fits = "yes" if self._first and _fits(path, device) else "no"
        fits, *_ = self._ranks.share(fits, "choosing a reference", timeout_s=DEFAULT_TIMEOUT_S)
        self.kind = "whole" if fits == "yes" else "split"
        here = self.kind == "whole" and self._first
        self._whole = load_engine().load(path, device=str(device), dtype=dtype) if here else None

    def ask(self, question: Callable[[nn.Module], T]) -> T | None:
        """The uncompressed model's answer, on the first rank; None on the others, which wait for it."""
        answer = None
        if self.kind == "split":
            answer = question(self._part)
        elif self._whole is not None:
            with _all_cores():
                answer = question(self._whole)
        self._ranks.native_all_reduce(torch.zeros(1, device=device_of(self._part)))
        return answer if self._first else None

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


@contextmanager
def _all_cores() -> Iterator[None]:
    """The cores of ranks that wait."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
