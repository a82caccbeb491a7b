"""Engines: their run-time seam (what travels, taking over, giving back), and their model files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forwards
from narrowcast.plan import ModelFingerprint
from narrowcast.plan.split import Split
from narrowcast.runtime.prompts import Prompts
from narrowcast.runtime.wires import Wires
from narrowcast.transport import Groups
from narrowcast.weights.formats import WeightFormat
from narrowcast.weights.packed import packed_shape

Dtype = Literal["auto", "bfloat16", "float32"]  # auto: as weights are stored

# In what weights are kept: as they are stored, unpacked to the dtype, or, of what is stored in it, in few bits.
Weights = Literal["stored", "dense", "int4-group32", "int8-group32"]

# The matrices of the vocabulary that every rank keeps whole: "all" is the embedding and the output layer.
Replicated = Literal["none", "embedding", "all"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Bytes of a whole model's weights: of `all` of them, of its `embedding`, of its `output` layer.

    Of the last two, 0 for a matrix that ranks do not share out; `tied`: the two are one matrix.
    """

    all: int
    embedding: int
    output: int
    tied: bool

    def added(self, replicated: Replicated, tp_size: int) -> int:
        """Bytes that a rank holds more."""
        matrices = 0 if replicated == "none" else self.embedding
        if replicated == "all" and not self.tied:
            matrices += self.output
        return matrices * (tp_size - 1) // tp_size

    def kept_in(self, matrices: "Sequence[Matrix]") -> "Vocabulary":
        """The same of a model whose matrices are these, of which some may be in few bits."""
        looked_up = sum(each.nbytes for each in matrices if not each.used)
        output = sum(each.nbytes for each in matrices if each.of_last)
        return Vocabulary(
            all=sum(each.nbytes for each in matrices),
            embedding=(output if self.tied else looked_up) if self.embedding else 0,
            output=output if self.output else 0,
            tied=self.tied,
        )


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix [N, K] of weights, or `number` of alike ones, such as experts, of which a token is multiplied by `used`.

    `format`: that in few bits, or the dtype of its values. `is_shared`: among ranks. `of_last`: only the last token of
    a prompt is multiplied by it.
    """

    shape: tuple[int, int]
    format: WeightFormat | torch.dtype
    is_shared: bool
    number: int = 1
    used: int = 1
    of_last: bool = False

    @property
    def nbytes(self) -> int:
        """Of all of them, in memory."""
        if isinstance(self.format, WeightFormat):
            return self.number * math.prod(packed_shape(self.format, self.shape))
        return self.number * math.prod(self.shape) * self.format.itemsize


class Pages(Protocol):
    """Requests of any length that a split model runs together, their keys and values in pages of one room.

    All ranks call the same, in one order; the model does nothing else meanwhile.
    """

    def add(self, name: str, prompt: Sequence[int]) -> None:
        """Let a request, of one token at least, begin when there is room for it."""
        ...

    def remove(self, name: str) -> None:
        """End a request, wherever it is, and free its room."""
        ...

    def forward(self) -> tuple[Sequence[str], Tensor]:
        """Run the next batch: the requests that now want a token, and their logits fp32 [N, V], alike on all ranks."""
        ...

    def take(self, tokens: Sequence[int]) -> None:
        """Let the requests that the last forward named go on with these tokens, in that order; before the next one."""
        ...

    def score(self, tokens: Sequence[int], *, begins: bool) -> Tensor:
        """The logits fp32 [T, V] after each token of a text, which begins with these or goes on with them.

        Apart from all requests: as a plain forward has them.
        """
        ...

    def usage(self) -> float:
        """The share of the room that requests use; what is kept in case a prompt begins alike is free."""
        ...


class Seam(Protocol):
    """The run-time seam of an engine: where a model's values travel, and how to reach these places."""

    def split_of(self, model: nn.Module) -> Split:
        """The way in which the engine has spread the model; Split() if it is whole."""
        ...

    def sites(self, model: nn.Module, split: Split) -> Mapping[str, str]:
        """Kinds of the sites by name, of a whole model as if it were split, or of this rank's part of it.

        InvalidInputError if there are none, or if something would travel that is not supported.
        """
        ...

    def computing_shares(self, model: nn.Module, split: Split) -> Sequence[str]:
        """Modules that compute each rank's own share of a block from the residual stream, as a norm gives it."""
        ...

    def check_shares(self, model: nn.Module, split: Split) -> None:
        """InvalidInputError unless what comes of such a share is the rank's own until it is summed."""
        ...

    def shares_read(self, model: nn.Module, module: str) -> Tensor:
        """Sums of squares of this rank's weights of such a module, by feature of the stream, fp64 [E]."""
        ...

    def groups(self, model: nn.Module) -> Groups:
        """The groups of a split model."""
        ...

    def take_over(self, model: nn.Module, split: Split, wires: Wires) -> Forwards:
        """Send over `wires` whatever travels: from this rank's part of a split model, or virtually, from a whole one.

        What is returned gives the engine its forwards back.
        """
        ...

    def halve_prompts(self, model: nn.Module, wires: Wires, prompts: Prompts, forwards: Forwards) -> None:
        """Let a model that was taken over run long prompts in halves over `wires`, where what it is given allows that.

        The last half's output is the whole one's. `prompts` says where to cut, and counts; `forwards` gives all back.
        """
        ...

    def short_prompt(self, model: nn.Module, num_tokens: int) -> Tensor:
        """The logits [T, V] of some prompt of that length, as the model is now."""
        ...

    def pages(self, model: nn.Module, *, num_tokens: int, max_requests: int, max_batch_tokens: int) -> Pages:
        """Room for the keys and values of so many tokens, shared by the requests of which so many run at once.

        A forward takes `max_batch_tokens` at most: longer prompts are read in several. Where the room is used up,
        requests give theirs back and are read again later. InvalidInputError for a model that cannot run so.
        """
        ...


class ModelFiles(Protocol):
    """The models of an engine at rest: loading, saving, packing, telling them apart, rotating them."""

    def load(
        self,
        path: str | Path,
        *,
        split: Split = ...,
        replicated: Replicated = "none",
        device: str | None = None,
        dtype: Dtype = "auto",
        weights: Weights = "stored",
    ) -> nn.Module:
        """The model in a folder or of a hub name, on `device`, in `dtype`; or this rank's part of it as `split` says.

        `weights`: matrices that are stored in few bits stay so, or are unpacked ("dense"); those that are stored in the
        dtype become such of few bits. Products then read activations in 8 bits or in `dtype`, as the format has it.

        `replicated`: what every rank keeps whole. Where embedding and output layer are one matrix, "embedding" still
        shares out the product with it.
        """
        ...

    def skeleton(self, path: str | Path) -> nn.Module:
        """The model of a folder or hub name as its config describes it: shapes, and no weights."""
        ...

    def obstacle(self, model: nn.Module, split: Split) -> str:
        """The reason why a whole model, or a skeleton, cannot be split so, and how it can; "" for none."""
        ...

    def vocabulary(self, model: nn.Module) -> Vocabulary:
        """The sizes of a whole model, or of its skeleton."""
        ...

    def matrices(self, path: str | Path, *, weights: Weights = "stored") -> Sequence[Matrix]:
        """The matrices of a model, of which no values are read: its config, and headers of files if they are there.

        An embedding that is looked up alone is one, of which none is `used`.
        """
        ...

    def load_tokenizer(self, path: str | Path) -> Any:
        """The tokenizer beside the model."""
        ...

    def save(self, model: nn.Module, path: str | Path) -> None:
        """Write a whole model into a folder that `load` reads."""
        ...

    def pack(self, path: str | Path, folder: str | Path, *, weights: Weights = "stored") -> None:
        """Write the model of `path` into a folder that is there, in few bits as kernels read them; `load` maps it.

        `weights`: as of `load`. Takes little memory. InvalidInputError where no weights would be in few bits.
        """
        ...

    def fingerprint(self, model: nn.Module) -> ModelFingerprint:
        """The model's fingerprint: the same for the whole model and for any split of it."""
        ...

    def num_features(self, model: nn.Module) -> int:
        """E of the residual stream."""
        ...

    def rotate(self, model: nn.Module, rotation_EE: Tensor) -> None:
        """Fold a rotation of the residual stream into a whole model's weights, in place.

        InvalidInputError, with the model as it was, where that would change its answers.
        """
        ...


class Engine(Seam, ModelFiles, Protocol):
    """One inference engine. A package in this folder fulfils it; nothing else imports the engine."""
