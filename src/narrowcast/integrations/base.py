"""What an engine must tell: where a model's partial sums are made, how to reach them, and what the model is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from narrowcast.communicator import Communicator
from narrowcast.integrations.forwards import Forwards
from narrowcast.plan import ModelFingerprint


class Engine(Protocol):
    """One inference engine. Modules of this package fulfil it; no other file imports the engine."""

    def load(self, path: str | Path, *, tp_size: int = 1, device: str | None = None) -> nn.Module:
        """The model in a folder or of a hub name, on `device`; with `tp_size` > 1 this rank's part of it."""
        ...

    def load_tokenizer(self, path: str | Path) -> Any:
        """The tokenizer beside the model."""
        ...

    def row_parallel_layers(self, model: nn.Module) -> Mapping[str, nn.Linear]:
        """The layers whose outputs are partial sums, by name, split or not; InvalidInputError if there are none."""
        ...

    def tp_size(self, model: nn.Module) -> int:
        """Ranks over which the engine has split the model; 1 if it is whole."""
        ...

    def fingerprint(self, model: nn.Module) -> ModelFingerprint:
        """The model's fingerprint: the same for the whole model and for any split of it."""
        ...

    def group(self, model: nn.Module) -> torch.distributed.ProcessGroup:
        """The tensor-parallel group of a split model."""
        ...

    def take_over(self, model: nn.Module, communicator: Communicator) -> Forwards:
        """Send through `communicator` whatever the split model sends; what is returned puts the engine back."""
        ...
