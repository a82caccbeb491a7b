"""Models of a config without their weights."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from narrowcast.errors import MissingDependencyError


def empty(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model without weights; buffers, which no file has, are there."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise MissingDependencyError("accelerate", "transformers") from error
    with init_empty_weights(include_buffers=False):
        return made(config, dtype)


def made(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model on PyTorch's default device; what quantizers its config asks for is forgotten."""
    from transformers import AutoModelForCausalLM

    with _without_quantization(config):
        return cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=dtype))


@contextlib.contextmanager
def _without_quantization(config: Any) -> Iterator[None]:
    """The engine has quantizers of its own for what a config may ask for."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    yield


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """The parameters that another one stands for."""
    module = cast(Any, model)
    if not module.config.get_text_config().tie_word_embeddings:
        return {}
    embedding, output = module.get_input_embeddings(), module.get_output_embeddings()
    names = {id(layer): name for name, layer in model.named_modules()}
    if output is None or id(embedding) not in names:  # another stage of a pipeline has it
        return {}
    return {f"{names[id(output)]}.weight": f"{names[id(embedding)]}.weight"}
