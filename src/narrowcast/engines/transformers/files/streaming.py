"""Models that are larger than memory: of a mapped file, some layers stay, and others are read before they compute."""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from narrowcast.engines.replication import free_host_nbytes
from narrowcast.weights.layers import PackedLinear
from narrowcast.weights.mapped import MappedFile

SHARE = 0.8  # of the memory that is free, what weights take: caches, activations and other programs need the rest
AHEAD = 1  # parts that are read while another one computes


@dataclass(frozen=True)
class Part:
    """A part of the model that computes at once: a decoder layer, or the output layer. `weights`: in the file."""

    module: nn.Module
    weights: Sequence[Tensor]

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(weight.numel() for weight in self.weights)


def stream(model: nn.Module, file: MappedFile) -> None:
    """Let a model read its weights ahead, and drop them, where they do not fit into the memory that is free.

    The ranks of a machine have a part of it each. Results are the same; where all fits, nothing is done.
    """
    room = int(SHARE * free_host_nbytes()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parts = _parts(model, file)
    if room and sum(part.nbytes for part in parts) > room:
        Reader(file, parts, streamed(parts, room))


def streamed(parts: Sequence[Part], room: int) -> set[int]:
    """The numbers of the few that do not stay, spread evenly: they are read while others compute."""
    sizes = [part.nbytes for part in parts]
    for count in range(len(parts) + 1):
        found = {(2 * number + 1) * len(parts) // (2 * count) for number in range(count)}
        passing = sorted((sizes[number] for number in found), reverse=True)
        if sum(sizes) - sum(passing) + sum(passing[: AHEAD + 1]) <= room:
            break
    return found


class Reader:
    """Reads parts in the order in which they compute, from the last one on to the first again, in a thread of its own.

    Each is told to it by a hook of its module, and waited for; `streamed` ones are dropped when others have begun.
    """

    def __init__(self, file: MappedFile, parts: Sequence[Part], streamed: set[int]) -> None:
        self._file, self._parts, self._streamed = file, [part.weights for part in parts], streamed
        self._reading: dict[int, Future[None]] = {}
        self._reader, self._dropper = (ThreadPoolExecutor(1, f"narrowcast-{name}") for name in ("reader", "dropper"))
        for number, part in enumerate(parts):
            part.module.register_forward_pre_hook(functools.partial(self._begin, number))

    def _begin(self, number: int, *_: Any) -> None:
        """Wait for a part, having let the next ones be read."""
        wanted = list(self._ahead(number))
        for past in self._reading.keys() - {*wanted} & self._streamed:
            del self._reading[past]
            self._dropper.submit(self._drop, past)
        for each in wanted:
            if each not in self._reading:
                self._reading[each] = self._reader.submit(self._read, each)
        self._reading[number].result()

    def _ahead(self, number: int) -> Iterator[int]:
        """This part and the next ones, until `AHEAD` of those that do not stay are among the latter."""
        found = 0
        for step in range(len(self._parts)):
            yield (each := (number + step) % len(self._parts))
            found += step > 0 and each in self._streamed
            if found == AHEAD:
                return

    def _read(self, number: int) -> None:
        self._file.read(*self._parts[number])

    def _drop(self, number: int) -> None:
        self._file.forget(*self._parts[number])


def _parts(model: nn.Module, file: MappedFile) -> list[Part]:
    """Those that read all of their weights for every token, in their order."""
    module = cast(Any, model)
    layers = [each for each in model.modules() if isinstance(each, nn.ModuleList)][:1]
    computing = [*(layer for each in layers for layer in each), module.get_output_embeddings()]
    parts = [Part(each, _weights(each, file)) for each in computing if each is not None]
    return [part for part in parts if part.weights]


def _weights(module: nn.Module, file: MappedFile) -> list[Tensor]:
    """The blocks of matrices that are in the file."""
    matrices = [each.matrix for each in module.modules() if isinstance(each, PackedLinear)]
    return [matrix.blocks for matrix in matrices if file.holds(matrix.blocks)]
