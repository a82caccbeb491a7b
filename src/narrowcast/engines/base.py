"""What an engine must tell: where a model's values travel, how to reach these places, and what the model is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from narrowcast.engines.forwards import Forwards
from narrowcast.plan import ModelFingerprint
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.wires import Wires
from narrowcast.transport import Groups


class Engine(Protocol):
    """One inference engine. Modules of this package fulfil it; no other file imports the engine."""

    def load(
        self, path: str | Path, *, split: Split = ..., replicate_vocabulary: bool = False, device: str | None = None
    ) -> nn.Module:
        """The model in a folder or of a hub name, on `device`; or this rank's part of it as `split` says.

        With `replicate_vocabulary` each rank keeps all of the embedding and of the output layer.
        """
        ...

    def skeleton(self, path: str | Path) -> nn.Module:
        """The model of a folder or hub name as its config describes it: shapes, and no weights."""
        ...

    def load_tokenizer(self, path: str | Path) -> Any:
        """The tokenizer beside the model."""
        ...

    def split_of(self, model: nn.Module) -> Split:
        """How the engine has spread the model; Split() if it is whole."""
        ...

    def sites(self, model: nn.Module, split: Split) -> Mapping[str, str]:
        """Kinds of the sites by name, of a whole model as if it were split, or of this rank's part of it.

        InvalidInputError if there are none, or if something would travel that is not supported.
        """
        ...

    def fingerprint(self, model: nn.Module) -> ModelFingerprint:
        """The model's fingerprint: the same for the whole model and for any split of it."""
        ...

    def groups(self, model: nn.Module) -> Groups:
        """The groups of a split model."""
        ...

    def split_virtually(self, model: nn.Module, split: Split, wires: Wires) -> Forwards:
        """Let a whole model compute what all ranks of `split` would, its values travelling over `wires`."""
        ...

    def take_over(self, model: nn.Module, communicator: Communicator) -> Forwards:
        """Send through `communicator` whatever the split model sends; what is returned puts the engine back."""
        ...

    def num_features(self, model: nn.Module) -> int:
        """E of the residual stream."""
        ...

    def rotate(self, model: nn.Module, rotation_EE: Tensor) -> None:
        """Fold a rotation of the residual stream into a whole model's weights, in place.

        InvalidInputError, with the model as it was, where that would change its answers.
        """
        ...

    def save(self, model: nn.Module, path: str | Path) -> None:
        """Write a whole model into a folder that `load` reads."""
        ...
