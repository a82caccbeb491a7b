"""Transformers (5.20 to 5.23): the seam of its own tensor parallelism.

A model's `tp_plan` names a style for each module. Where a style communicates, `module.forward` is an instance
attribute that the engine has set; ours takes its place. Weights of a split model are DTensors.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from narrowcast.communicator import Communicator
from narrowcast.errors import InvalidInputError, MissingDependencyError
from narrowcast.integrations.forwards import Forward, Forwards, add_bias, chunk
from narrowcast.plan import ModelFingerprint

ROWWISE = "rowwise"
SILENT_STYLES = {"colwise", "replicate", "replicated_with_grad_allreduce", "local_params"}

CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
)
NUM_SAMPLES = 16  # of each weight: a rank of 16 or fewer holds at least one


def row_parallel_layers(model: nn.Module) -> Mapping[str, nn.Linear]:
    """Layers of style "rowwise"; InvalidInputError if there are none, or styles that are not supported beside them."""
    layers: dict[str, nn.Linear] = {}
    for name, module, style in _styled_modules(model):
        if style == ROWWISE and isinstance(module, nn.Linear):
            layers[name] = module
        if style not in SILENT_STYLES and not (style in TAKEN_OVER and _is_plain(module)):
            raise InvalidInputError(
                type(model).__name__,
                expected="plain linear layers and embeddings, split by columns and rows (Llama, Qwen3)",
                found=f"{name} of style {style!r} ({type(module).__name__})",
                remedy="This model is not supported yet.",
            )
    if not layers:
        raise InvalidInputError(
            type(model).__name__,
            expected="a Transformers model with a tensor-parallel plan",
            found="no row-parallel layer",
            remedy="Load one such as Llama or Qwen3 with AutoModelForCausalLM.",
        )
    return layers


def tp_size(model: nn.Module) -> int:
    """Ranks that the weights of the row-parallel layers are spread over."""
    weight = next(iter(row_parallel_layers(model).values())).weight
    return weight.device_mesh.size() if isinstance(weight, DTensor) else 1


def group(model: nn.Module) -> torch.distributed.ProcessGroup:
    """The group of the mesh that the weights are spread over."""
    weight = next(iter(row_parallel_layers(model).values())).weight
    assert isinstance(weight, DTensor), "only a split model has a group"
    return weight.device_mesh.get_group()


def fingerprint(model: nn.Module) -> ModelFingerprint:
    """Config fields; digests of columns of row-parallel weights and of rows of the embedding, in BF16."""
    config = cast(Any, model).config.get_text_config()
    samples = {name: _digests(layer.weight, dim=1) for name, layer in row_parallel_layers(model).items()}
    embedding = cast(Any, model).get_input_embeddings().weight
    samples["embedding"] = _digests(embedding, dim=0)
    fields = {field: getattr(config, field) for field in CONFIG_FIELDS if hasattr(config, field)}
    fields["rope_theta"] = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    return ModelFingerprint(config=fields, samples=samples)


def take_over(model: nn.Module, communicator: Communicator) -> Forwards:
    """Replace the forward of every module that communicates."""
    forwards = Forwards()
    for name, module, style in _styled_modules(model):
        if style in TAKEN_OVER:
            forwards.replace(module, TAKEN_OVER[style](name, module, communicator))
    return forwards


def load(path: str | Path, *, tp_size: int = 1, device: str | None = None) -> nn.Module:
    """The causal LM in folder or of hub name `path`, split over the ranks of torch.distributed if `tp_size` > 1.

    A whole model goes to `device`; where a part goes, Transformers decides.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a rank would garble the screen
    split = {} if tp_size == 1 else {"distributed_config": DistributedConfig(tp_size=tp_size)}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **split)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from error
    except ImportError as error:  # splitting a model needs accelerate besides
        raise MissingDependencyError(error.name or "accelerate", "transformers") from error
    _check_heads(model.config.get_text_config(), tp_size)
    return cast(nn.Module, model.to(device))


def _check_heads(config: Any, tp_size: int) -> None:
    """Transformers splits attention by whole heads and fails deep inside where that cannot be."""
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, tp_size)
        if heads % tp_size:
            raise InvalidInputError(
                f"tp_size {tp_size}",
                expected=f"a divisor of the model's {field}",
                found=heads,
                remedy="Choose another tp_size; simulation takes any.",
            )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from error


def _row_parallel(name: str, module: Any, communicator: Communicator) -> Forward:
    weight, bias = _local(module.weight), module.bias

    def forward(x: Tensor) -> Tensor:
        partial = functional.linear(x, weight)
        return add_bias(communicator.all_reduce(partial, name), None if bias is None else _local(bias))

    return forward


def _vocab_parallel_embedding(name: str, module: Any, communicator: Communicator) -> Forward:
    own, vocab_size = _own_chunk(module.weight, 0), module.weight.shape[0]
    weight = _local(module.weight)

    def forward(ids: Tensor) -> Tensor:
        if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise IndexError(f"token ids from {ids.min()} to {ids.max()} for a vocabulary of {vocab_size}")
        held = (ids >= own.start) & (ids < own.stop)
        rows = (ids - own.start).masked_fill_(~held, 0)
        x = weight[rows] if len(weight) else weight.new_zeros(*ids.shape, weight.shape[1])
        x.masked_fill_(~held[..., None], 0)
        return communicator.all_reduce_uncompressed(x, name)

    return forward


def _gathered_columns(name: str, module: Any, communicator: Communicator) -> Forward:
    world_size = communicator.transport.world_size
    sizes = [chunk(module.weight.shape[0], rank, world_size) for rank in range(world_size)]
    num_features = [own.stop - own.start for own in sizes]
    weight, bias = _local(module.weight), module.bias

    def forward(x: Tensor) -> Tensor:
        logits = functional.linear(x, weight, None if bias is None else _local(bias))
        return communicator.all_gather_features(logits, name, num_features)

    return forward


TAKEN_OVER = {
    ROWWISE: _row_parallel,
    "embedding_rowwise": _vocab_parallel_embedding,
    "colwise_gather_output": _gathered_columns,
    "colwise_rep": _gathered_columns,
}


def _styled_modules(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    plan = getattr(model, "tp_plan", None) or {}
    named = [(name, module, plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))) for name, module in model.named_modules()]
    return [(name, module, style) for name, module, style in named if style is not None]


def _is_plain(module: nn.Module) -> bool:
    """Whether the module computes what ours do: some families scale their embedding's output, say."""
    return type(module).forward in (nn.Linear.forward, nn.Embedding.forward)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _own_chunk(weight: Tensor, dim: int) -> slice:
    """What this rank holds of a weight's `dim`: all of it unless the weight is split."""
    if not isinstance(weight, DTensor) or not weight.placements[0].is_shard():
        return slice(0, weight.shape[dim])
    return chunk(weight.shape[dim], weight.device_mesh.get_local_rank(), weight.device_mesh.size())


def _digests(weight: Tensor, dim: int) -> list[str | None]:
    own, size = _own_chunk(weight, dim), weight.shape[dim]
    local = _local(weight).detach()
    digests: list[str | None] = []
    for sample in range(NUM_SAMPLES):
        place = (2 * sample + 1) * size // (2 * NUM_SAMPLES)
        held = own.start <= place < own.stop
        digests.append(_digest(local.select(dim, place - own.start)) if held else None)
    return digests


def _digest(values: Tensor) -> str:
    raw = values.bfloat16().contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=4).hexdigest()


def _not_loaded(path: str | Path, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"model {path}",
        expected="a folder or hub name that Transformers can load",
        found=str(error).strip().splitlines()[0].rstrip("."),
        remedy="Check the name; offline, pass a folder.",
    )
