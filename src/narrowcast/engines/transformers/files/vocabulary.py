"""The two matrices of a model's vocabulary: their sizes, and how they are spread where each rank keeps them whole."""

from typing import Any, NamedTuple, cast

from torch import nn

from narrowcast.engines.base import Replicated, Vocabulary
from narrowcast.engines.transformers.seam import OWN_COLUMNS


class Layers(NamedTuple):
    """Names of the layers that look tokens up and give logits, "" for one that the model's plan does not split."""

    embedding: str
    output: str
    tied: bool


def vocabulary(model: nn.Module) -> Vocabulary:
    """Bytes by the weights' own dtype; a matrix that serves twice counts once."""
    layers = _layers(model)
    weights = {id(weight): weight.numel() * weight.element_size() for weight in model.parameters()}
    embedding, output = (
        weights[id(model.get_submodule(name).weight)] if name else 0 for name in (layers.embedding, layers.output)
    )
    return Vocabulary(all=sum(weights.values()), embedding=embedding, output=output, tied=layers.tied)


def styles(model: nn.Module, replicated: Replicated) -> dict[str, str]:
    """The styles by layer that say so; of a model that only has to have the right shapes."""
    layers = _layers(model)
    if replicated == "none" or not layers.embedding:
        return {}
    found = {layers.embedding: "replicate"}
    if layers.output and (replicated == "all" or layers.tied):
        found[layers.output] = "replicate" if replicated == "all" else OWN_COLUMNS
    return found


def _layers(model: nn.Module) -> Layers:
    module = cast(Any, model)
    plan, embedding, output = module.tp_plan or {}, module.get_input_embeddings(), module.get_output_embeddings()
    names = {id(layer): name for name, layer in model.named_modules()}
    split = [names[id(layer)] if layer is not None else "" for layer in (embedding, output)]
    embedding_name, output_name = (name if name in plan else "" for name in split)
    tied = output is not None and output.weight is embedding.weight
    return Layers(embedding_name, output_name, tied)
