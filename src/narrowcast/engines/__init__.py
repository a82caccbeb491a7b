"""Inference engines. `ENGINES`: the module that serves a model, by the package that made it."""

import importlib
from typing import Any, cast

import torch
from torch import nn

from narrowcast.engines.base import Dtype, Engine, Matrix, Replicated, Weights
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
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if num_tokens > (longest := getattr(config, "max_position_embeddings", None) or num_tokens):
        raise InvalidInputError(
            subject, expected=f"{longest} tokens at most, the model's context", found=num_tokens, remedy="Pass fewer."
        )


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
    "Replicated",
    "Weights",
    "computes_bf16",
    "device_of",
    "engine_of",
    "load_engine",
]
