"""Pipeline parallelism: hidden states from stage to stage, logits from the last stage to all."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.engines.forwards import Forward, Forwards
from narrowcast.engines.transformers.seam.stage_cache import tell_own_lengths_
from narrowcast.errors import InvalidInputError
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.wires import VirtualWires, Wires

LOGITS = "logits"
DROPPED = "labels", "output_hidden_states", "output_attentions"


def stage_of(model: nn.Module) -> Any:
    """The engine's record of this rank's stage; None where the model is not split into stages."""
    return getattr(model, "_pp_stage", None)


def is_later_stage(model: nn.Module) -> bool:
    """Not the one that text comes to first."""
    stage = stage_of(model)
    return stage is not None and not stage.pp_is_first_stage


def own_layers(model: nn.Module) -> range:
    """The numbers of the layers that this rank's stage holds."""
    stage = stage_of(model)
    return range(*stage.layer_range_for_rank(stage.pp_rank, len(cast(Any, model).base_model.layers)))


def boundaries(model: nn.Module, pp_size: int) -> list[str]:
    """The last layer of each stage but the last. Stages have as many layers each; the rest goes to the last."""
    prefix = cast(Any, model).base_model_prefix
    num_layers = len(getattr(cast(Any, model).base_model, "layers", ()))
    if num_layers < pp_size:
        raise InvalidInputError(
            f"pp_size {pp_size}",
            expected="a model with at least as many layers, in a list named layers",
            found=num_layers,
            remedy="Choose fewer stages, or a model such as Llama.",
        )
    return [f"{prefix}.layers.{stage * (num_layers // pp_size) - 1}" for stage in range(1, pp_size)]


def sites(model: nn.Module, pp_size: int) -> dict[str, str]:
    """Kinds of the sites between stages: all of a whole model, or those where this rank's stage takes part."""
    names, stage = boundaries(model, pp_size), stage_of(model)
    if stage is not None:
        names = names[max(stage.pp_rank - 1, 0) : stage.pp_rank + 1]
    return dict.fromkeys(names, "boundary") | {LOGITS: LOGITS}


def take_over(model: nn.Module, pp_size: int, wires: Wires, forwards: Forwards) -> None:
    """Let hidden states and logits travel over `wires`: those of this rank's stage, or of a whole model."""
    if isinstance(wires, Communicator):
        _take_over_stage(model, wires, forwards)
    else:
        assert isinstance(wires, VirtualWires), "who runs no stage runs all of them"
        _take_over_whole(model, pp_size, wires, forwards)


def _take_over_whole(model: nn.Module, pp_size: int, wires: VirtualWires, forwards: Forwards) -> None:
    for name in boundaries(model, pp_size):
        layer = model.get_submodule(name)
        forwards.replace(layer, _moved(name, layer, wires))

    whole = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = whole(*args, **kwargs)
        outputs.logits = wires.move(outputs.logits, LOGITS, pp_size - 1)
        return outputs

    forwards.replace(model, forward)


def _moved(name: str, layer: nn.Module, wires: VirtualWires) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = type(layer).forward(layer, *args, **kwargs)
        return wires.move(x, name, 1)

    return forward


def _take_over_stage(model: nn.Module, communicator: Communicator, forwards: Forwards) -> None:
    """Give the model a stage that sends through `communicator`. The engine's own forward goes on driving it."""
    stage = _coded_stage(model, communicator)
    forwards.set(model, "_pp_stage", stage)
    signature, driven, layers = inspect.signature(type(model).forward), model.forward, own_layers(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(model, *args, **kwargs).arguments
        _check_asked({**arguments, **arguments.get("kwargs", {})})
        tell_own_lengths_(arguments.get("past_key_values"), layers)
        kept = arguments.get("logits_to_keep", 0)
        stage.logits_to_keep = kept.numel() if isinstance(kept, Tensor) else kept or None
        outputs = driven(*args, **kwargs)
        tell_own_lengths_(outputs.past_key_values, layers)
        return outputs

    forwards.replace(model, forward)


def _check_asked(arguments: Mapping[str, Any]) -> None:
    """Logits and a cache are all that the engine's pipeline gives: it drops other things, without an error."""
    asked = [name for name in DROPPED if arguments.get(name) is not None and arguments[name] is not False]
    if asked:
        raise InvalidInputError(
            "pipeline", expected="a forward for logits", found=" and ".join(asked), remedy="Ask a model in one stage."
        )


def _coded_stage(model: Any, communicator: Communicator) -> Any:
    from transformers.distributed.pipeline_parallel import PipelineStage

    assert communicator.pp is not None, "a model with stages has a pipeline group"
    names, vocab_size = boundaries(model, communicator.pp.world_size), model.config.get_text_config().vocab_size

    class CodedStage(PipelineStage):  # type: ignore[misc]
        """The engine's stage, sending coded. Sizes follow from the input: none is sent."""

        logits_to_keep: int | None = None  # None: of all tokens

        def communicate(
            self,
            operation: str,
            *,
            device: torch.device,
            dtype: torch.dtype,
            tensor: Tensor | None = None,
            shape: Sequence[int] | None = None,
        ) -> Tensor | None:
            if operation == "recv_forward":
                assert shape is not None, "the engine passes the shape of what it waits for"
                self.batch_and_length = tuple(shape[:2])
                if self.pp_is_first_stage:
                    return None
                site = names[self.pp_rank - 1]
                return communicator.recv(shape, site, src=self.pp_prev_rank, dtype=dtype, device=device)
            assert tensor is not None, "the engine passes what it sends"
            self.batch_and_length = tuple(tensor.shape[:2])
            if not self.pp_is_last_stage:
                communicator.send(tensor.to(dtype), names[self.pp_rank], dst=self.pp_next_rank)
            return None

        def broadcast_from_last(self, tensor: Tensor | None, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            batch, length = self.batch_and_length
            kept = length if self.logits_to_keep is None else min(self.logits_to_keep, length)
            shape = batch, kept, vocab_size
            if not kept:  # as of a half of a prompt that is not the last: no stage is waited for
                return torch.empty(shape, dtype=dtype, device=device)
            x = None if tensor is None else tensor.to(dtype)
            return communicator.broadcast(x, shape, LOGITS, src=self.pp_size - 1, dtype=dtype, device=device)

    stage = CodedStage.__new__(CodedStage)
    stage.__dict__.update(stage_of(model).__dict__)
    return stage
