"""Experts of a checkpoint by two names: each matrix by itself, and as the engine's parameters, which hold them all."""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from narrowcast.weights.checkpoint import ALL, Checkpoint
from narrowcast.weights.experts import JOINED, layer_names
from narrowcast.weights.formats import GroupedCodes, WeightFormat

MATRIX = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
OF_MIXTRAL = re.compile(r"(.+)\.block_sparse_moe\.experts\.\d+\.w1\.weight")
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's are those of its paper


class ByExpert:
    """A `Checkpoint` in which `experts.3.up_proj.weight` is a matrix, and `experts.gate_up_proj` the values of all.

    The latter is made of the former where files have no such. Those without experts are as they are.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        blocks = {found[1] for name in checkpoint.names if (found := OF_MIXTRAL.fullmatch(name))}
        self._stored = {_renamed(name, blocks): name for name in checkpoint.names}
        numbers = defaultdict[str, set[int]](set)
        for found in filter(None, map(MATRIX.fullmatch, self._stored)):
            numbers[found[1]].add(int(found[2]))
        self._matrices: dict[str, list[str]] = {}  # by the engine's parameter
        for experts, each in numbers.items():
            for weight in JOINED:
                matrices = [f"{layer}.weight" for layer in layer_names(experts, weight, len(each))]
                if self._stored.keys() >= set(matrices):
                    self._matrices[f"{experts}.{weight}"] = matrices
        self.names: Collection[str] = self._stored.keys() | self._matrices.keys()

    @property
    def notes(self) -> Sequence[str]:
        return self._checkpoint.notes

    def parameter(self, name: str) -> str:
        """The engine's parameter that a matrix of an expert is a part of; of all else the name."""
        found = MATRIX.fullmatch(name)
        return f"{found[1]}.{next(weight for weight in JOINED if found[3] in JOINED[weight])}" if found else name

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._stored:
            return self._checkpoint.shape(self._stored[name])
        num_parts = len(JOINED[name.rpartition(".")[2]])
        matrices = self._matrices[name]
        shapes = [self.shape(each) for each in matrices[:num_parts]]
        return len(matrices) // num_parts, sum(rows for rows, _ in shapes), shapes[0][1]

    def format(self, name: str) -> WeightFormat | None:
        return self._checkpoint.format(self._stored[name]) if name in self._stored else None

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        return self._checkpoint.codes(self._stored[name], rows, columns)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Of an engine's parameter, `rows` are experts."""
        if name in self._stored:
            return self._checkpoint.values(self._stored[name], rows, columns)
        num_experts, num_rows, _ = self.shape(name)
        matrices = self._matrices[name]
        per_expert = len(matrices) // num_experts
        chosen = [each for number in range(num_experts)[rows] for each in matrices[number * per_expert :][:per_expert]]
        whole = torch.cat([self.values(each, ALL, columns) for each in chosen])
        return whole.view(-1, num_rows, whole.shape[1])


def shapes_by_expert(name: str, experts: Any) -> dict[str, tuple[int, int]]:
    """Those that the matrices of the engine's module of experts have by themselves."""
    num_experts, num_features, num_hidden = experts.down_proj.shape
    shapes = {"gate_up_proj": (num_hidden, num_features), "down_proj": (num_features, num_hidden)}
    return {
        f"{layer}.weight": shape for weight, shape in shapes.items() for layer in layer_names(name, weight, num_experts)
    }


def _renamed(name: str, blocks: Collection[str]) -> str:
    """The engine's name of a tensor: what Mixtral's files call block_sparse_moe and w1 are mlp and gate_proj."""
    block, found, rest = name.partition(".block_sparse_moe.")
    if not found or block not in blocks:
        return name
    return f"{block}.mlp." + re.sub(r"(?<=\.)w[123](?=\.)", lambda found: NAMES[found[0]], rest)
