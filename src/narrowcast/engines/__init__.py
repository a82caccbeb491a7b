"""Inference engines. `ENGINES`: the module that serves a model, by the package that made it."""

import importlib
from typing import Any, cast

import torch
from torch import nn

from narrowcast.engines.base import Dtype, Engine, Matrix, Pages, Replicated, Weights
from narrowcast.errors import InvalidInputError, MissingDependencyError

ENGINES: dict[str, str] = {"transformers": "narrowcast.engines.transformers"}


def engine_of(model: nn.Module) -> Engine:
    """The engine that made `model`; InvalidInputError if none of ours did."""
    packages = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    for package, module in ENGINES.items():
        if package in packages:
            return load_engine(module)
    raise InvalidInputError(
        type(model).__name__,
        expected=f"a model of {' or '.join(ENGINES)}",
        found=f"one of {type(model).__module__}",
        remedy="Load it through one of these engines.",
    )


def load_engine(module: str = ENGINES["transformers"]) -> Engine:
    """Import an engine's module; MissingDependencyError if the engine is not installed."""
    try:
        importlib.import_module(module.rpartition(".")[2])
        return cast(Engine, importlib.import_module(module))
    except ModuleNotFoundError as error:
        raise MissingDependencyError(module.rpartition(".")[2], module.rpartition(".")[2]) from error


def check_length(subject: str, model: nn.Module, num_tokens: int) -> None:
    """InvalidInputError for more tokens than a model, or its skeleton, has places for."""
    if num_tokens > (longest := context_of(model) or num_tokens):
        raise InvalidInputError(
            subject, expected=f"{longest} tokens at most, the model's context", found=num_tokens, remedy="Pass fewer."
        )


def context_of(model: nn.Module) -> int | None:
    """The tokens that a model, or its skeleton, has places for; None where there is no end."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return getattr(config, "max_position_embeddings", None) or None


def vocab_size_of(model: nn.Module) -> int:
    """The token ids that a model knows: those below it."""
    return int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes."""
    return next(model.parameters()).device


def computes_bf16() -> bool:
    """True if this CPU multiplies in BF16; PyTorch emulates that where it does not, several times slower than FP32."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


__all__ = [
    "ENGINES",
    "Dtype",
    "Engine",
    "Matrix",
    "Pages",
    "Replicated",
    "Weights",
    "check_length",
    "computes_bf16",
    "context_of",
    "device_of",
    "engine_of",
    "load_engine",
    "vocab_size_of",
]
