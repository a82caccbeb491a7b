"""vLLM's layers, as they send over wires of ours. Each does as vLLM's own until it is given an operator.

Shapes: T tokens, F features of a rank's input, E features of the sum.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.distributed import split_tensor_along_last_dim
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer

from narrowcast.engines.forwards import Forward, Forwards, add_bias
from narrowcast.engines.identity import digest, sample_places
from narrowcast.errors import InvalidInputError
from narrowcast.runtime.wires import Wires

NAME = RowParallelLinear.__name__  # under which vLLM looks for another class


class SummedLinear(RowParallelLinear):  # type: ignore[misc]
    """A row-parallel layer whose partial sums [T, E] travel by `all_reduce`; vLLM's own where that is None.

    `samples`: digests of columns of the weight, by place, as the checkpoint has it: kernels may keep it in other forms.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.all_reduce: Callable[[Tensor], Tensor] | None = None
        self.samples: dict[int, str] = {}

    def forward(self, input_: Tensor) -> Any:
        return self.summed(input_, lambda x_TF: self.quant_method.apply(self, x_TF, None))

    def summed(self, input_: Tensor, product: Callable[[Tensor], Tensor]) -> Any:
        """The layer's outputs, of partial sums that `product` makes. vLLM's own forward adds rank 0's bias before."""
        if self.all_reduce is None:
            return super().forward(input_)
        if not self.input_is_parallel:
            input_ = split_tensor_along_last_dim(input_, num_partitions=self.tp_size)[self.tp_rank].contiguous()
        total = self.all_reduce(product(input_))
        if not self.skip_bias_add:
            total = add_bias(total, self.bias)
        return (total, self.bias if self.skip_bias_add else None) if self.return_bias else total

    def weight_loader(self, param: Any, loaded_weight: Tensor) -> None:
        self._sample(param, loaded_weight)
        super().weight_loader(param, loaded_weight)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        self._sample(param, loaded_weight)
        super().weight_loader_v2(param, loaded_weight)

    def _sample(self, param: Any, loaded_weight: Tensor) -> None:
        values = loaded_weight.dim() == 2 and loaded_weight.is_floating_point() and loaded_weight.itemsize > 1
        if values and param is getattr(self, "weight", None) and loaded_weight.shape[1] == self.input_size:
            self.samples = {place: digest(loaded_weight[:, place]) for place in sample_places(self.input_size)}


def register() -> None:
    """Have vLLM make such layers from now on. InvalidInputError if it makes those of another plug-in."""
    if op_registry_oot.setdefault(NAME, SummedLinear) is not SummedLinear:
        raise InvalidInputError(
            NAME,
            expected="vLLM's own layer",
            found=f"that of another plug-in, {op_registry_oot[NAME].__module__}",
            remedy="Leave one of the two out: VLLM_PLUGINS names those to load.",
        )


def summing(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name whose sums can be served, one that LoRA has wrapped as wrapped, and the embedding."""
    found = {}
    for name, module in model.named_modules():
        layer = unwrapped(module)
        if isinstance(layer, MoERunner):
            sums = module is layer and _sums_alone(layer)  # LoRA calls parts of experts, not their forward
        elif isinstance(layer, SummedLinear) or is_embedding(layer):
            sums = layer.reduce_results and layer.tp_size > 1  # otherwise whoever called it sums, with more in it
        else:
            continue
        if sums and not name.endswith(".base_layer"):
            found[name] = module
    return found


def _sums_alone(experts: Any) -> bool:
    """True for experts that add up over ranks what they compute, and nothing else such as shared experts."""
    config = experts.moe_config
    is_split = max(config.tp_size, config.ep_size) > 1 and not config.is_sequence_parallel
    return is_split and not config.skip_final_all_reduce and experts.shared_experts is None


def is_experts(module: nn.Module) -> bool:
    """True for the experts of a mixture, wrapped or not."""
    return isinstance(unwrapped(module), MoERunner)


def is_embedding(module: nn.Module) -> bool:
    """True for one that ranks share out by rows, wrapped or not."""
    layer = unwrapped(module)
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


def is_elsewhere(module: nn.Module) -> bool:
    """True for what stands for layers of another stage of the pipeline."""
    return isinstance(module, PPMissingLayer)


def sum_rows(name: str, module: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let a row-parallel layer's sums travel as site `name`."""
    layer = unwrapped(module)
    forwards.set(layer, "all_reduce", wires.partial_sums(name))
    if module is not layer:
        forwards.set(module, "forward", lambda x: layer.summed(x, module.apply))


def sum_experts(name: str, experts: Any, wires: Wires, forwards: Forwards) -> None:
    """Let what ranks' slices of experts, or whole experts, compute travel as site `name`.

    They read the rank's own view of the stream; their router, by which all ranks decide, the one that all share.
    """
    whole, router, all_reduce = experts.forward, experts.gate, wires.partial_sums(name)

    def forward(hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if router is not None:  # otherwise the caller has asked it
            router_logits, _ = router(hidden_states)
        return all_reduce(whole(wires.inputs(name, hidden_states)[0], router_logits, *args, **kwargs))

    forwards.set(experts.moe_config, "skip_final_all_reduce", True)
    forwards.set(experts, "gate", None)
    forwards.set(experts, "forward", forward)


def look_up(name: str, module: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let what ranks find of the tokens in an embedding travel as site `name`."""
    layer = unwrapped(module)
    whole, all_reduce = layer.forward, wires.partial_sums(name)
    forwards.set(layer, "reduce_results", False)
    forwards.set(layer, "forward", lambda ids: all_reduce(whole(ids)))


def read_stream(name: str, norm: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let a norm, which may first add the last sum to the stream, keep what the rank makes of its own view of it."""
    whole = norm.forward

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return wires.read(name, x, whole)
        normed, stream = whole(x, residual)
        wires.keep(name, stream, whole)
        return normed, stream

    forwards.set(norm, "forward", forward)


def keep_columns(name: str, layer: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let a column-parallel layer, which holds the plan's module `name`, compute from the rank's own view."""
    whole: Forward = layer.forward
    forwards.set(layer, "forward", lambda x: whole(wires.inputs(name, x)[0]))


def unwrapped(module: Any) -> Any:
    """The layer itself, where LoRA has wrapped it."""
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) and hasattr(module, "base_layer") else module
