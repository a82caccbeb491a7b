"""The run-time seam of Transformers (5.20 to 5.23): its own tensor, expert and pipeline parallelism.

A model's `tp_plan` and `ep_plan` name a style for each module. Where a style communicates, `module.forward` is an
instance attribute that the engine has set; ours takes its place. Weights of a split model are DTensors.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowcast.engines.forwards import Bound, Forward, Forwards, has_own_forward
from narrowcast.engines.layered import by_layer, in_words
from narrowcast.engines.transformers.decoding.families import for_steps
from narrowcast.engines.transformers.decoding.layers import FUSED
from narrowcast.engines.transformers.decoding.recorded import RECORDED, RecordedLayer, is_recorded
from narrowcast.engines.transformers.seam import embedding, experts, linear, pipeline, rehearsal
from narrowcast.engines.transformers.seam.halves import halve_prompts
from narrowcast.engines.transformers.sharding import is_experts, is_linear, is_packed, is_plain, reading_weights
from narrowcast.errors import InvalidInputError
from narrowcast.plan.split import Experts, Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.wires import Wires
from narrowcast.transport import Groups
from narrowcast.weights.experts import PackedExpert, PackedExperts, layer_names
from narrowcast.weights.layers import DenseLinear, PackedLinear

KEPT_COLUMNS = "colwise"
SLICES = "moe_tp_experts"  # of every expert
OWN_COLUMNS = "narrowcast_own_columns"  # of a weight that each rank has whole: ours, for tied output layers
# How the weights of a style are shared out: not at all, or by features of the output or of the input.
WHOLE, SPLIT_ROWS, SPLIT_COLUMNS = "whole", "rows", "columns"
SHARED_OUT = {
    "replicate": WHOLE,
    OWN_COLUMNS: WHOLE,
    **dict.fromkeys((KEPT_COLUMNS, "colwise_gather_output", "colwise_rep", "embedding_rowwise"), SPLIT_ROWS),
    **dict.fromkeys(("rowwise", "rowwise_split_input", "rowwise_rep"), SPLIT_COLUMNS),
}
REPLICATED = "replicated_with_grad_allreduce"
SILENT = {KEPT_COLUMNS, "replicate", REPLICATED, "local_params", "grouped_gemm"}


@dataclass(frozen=True)
class Style:
    """One parallel style of modules.

    `supports`: tells modules that we know from others. `forward(name, module, wires)`: the new forward, on this rank's
    part of a split model or, for all ranks, on a whole one. `sites(name)`: the kinds of its sites.
    """

    supports: Callable[[nn.Module], bool]
    forward: Callable[[str, Any, Wires], Forward]
    sites: Callable[[str], Mapping[str, str]]


def _one(kind: str) -> Callable[[str], Mapping[str, str]]:
    return lambda name: {name: kind}


_columns = Style(is_linear, linear.columns, _one("gather"))
_rows_of_whole_input = Style(is_linear, linear.rows_of_whole_input, _one("sum"))

STYLES = {
    "rowwise": Style(is_linear, linear.rows, _one("sum")),
    "rowwise_split_input": _rows_of_whole_input,
    "rowwise_rep": _rows_of_whole_input,
    "colwise_gather_output": _columns,
    "colwise_rep": _columns,
    OWN_COLUMNS: _columns,
    "embedding_rowwise": Style(embedding.is_lookup, embedding.lookup, _one("embedding")),
    SLICES: Style(is_experts, experts.slices, _one("sum")),
}

# Whole experts, each on one rank, by `Split.experts`.
EXPERT_STYLES = {
    "all_reduce": Style(is_experts, experts.whole_experts, _one("sum")),
    "all_to_all": Style(is_experts, experts.travelling_tokens, experts.sites_of_travelling_tokens),
}

EP_IMPLEMENTATIONS: dict[str, Experts] = {
    "auto": "all_reduce",  # at inference, where all ranks hold the same batch
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all",
}


def split_of(model: nn.Module) -> Split:
    """From the meshes that weights are spread over, the record of the stage, and the config."""
    meshes, stage = _meshes(model), pipeline.stage_of(model)
    if not meshes and stage is None:
        return Split()
    config: Any = getattr(cast(Any, model).config, "distributed_config", None)
    if (dp_size := getattr(config, "dp_size", getattr(config, "fsdp_size", 1))) > 1:
        raise _unsupported(model, "tensor, expert and pipeline parallelism", f"{dp_size} data-parallel ranks")
    return Split(
        tp_size=meshes[0].size() if meshes else 1,
        pp_size=1 if stage is None else stage.pp_size,
        experts=_experts(model, config),
    )


def _meshes(model: nn.Module) -> list[Any]:
    spread = [weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)]
    return spread or [
        module.device_mesh for module in model.modules() if is_packed(module) and module.device_mesh is not None
    ]


def styles_of(model: nn.Module) -> dict[str, str]:
    """By name, how a split shares out modules: WHOLE, SPLIT_ROWS, SPLIT_COLUMNS, or in a way of their style's own."""
    found = {}
    for name, module, style in _styled(model, _plan(model, "tp_plan")):
        found[name] = SHARED_OUT.get(style, style)
        if style == SLICES and isinstance(module, PackedExperts):
            found |= dict.fromkeys(layer_names(name, "gate_up_proj", module.num_experts), SPLIT_ROWS)
            found |= dict.fromkeys(layer_names(name, "down_proj", module.num_experts), SPLIT_COLUMNS)
    return found


def _experts(model: nn.Module, config: Any) -> Experts:
    if getattr(config, "ep_size", 1) == 1:
        return "slices"
    implementation = getattr(config, "ep_implementation", "that of an earlier release")
    if implementation not in EP_IMPLEMENTATIONS:
        raise _unsupported(
            model, f"ep_implementation {' or '.join(EP_IMPLEMENTATIONS)} of Transformers 5.23", implementation
        )
    return EP_IMPLEMENTATIONS[implementation]


def sites(model: nn.Module, split: Split) -> Mapping[str, str]:
    """Kinds by name; InvalidInputError for a model that has no such place, or one that is not supported."""
    if pipeline.stage_of(model) is not None:  # whoever has split it
        rehearsal.check_stages(model, split.pp_size)
    found = dict(pipeline.sites(model, split.pp_size)) if split.pp_size > 1 else {}
    for name, module, style in _communicating(model, split):
        kinds = style.sites(name)
        is_head = module is cast(Any, model).get_output_embeddings()
        found |= dict.fromkeys(kinds, "logits") if is_head else kinds
    if pipeline.is_later_stage(model):  # which holds a tied embedding for its logits, and looks up nothing
        found = {name: kind for name, kind in found.items() if kind != "embedding"}
    if not found:
        raise _unsupported(model, "a Transformers model with a tensor-parallel plan", "no row-parallel layer")
    return found


def groups(model: nn.Module) -> Groups:
    """The groups of the meshes."""
    meshes, stage = _meshes(model), pipeline.stage_of(model)
    return Groups(tp=meshes[0].get_group() if meshes else None, pp=None if stage is None else stage.pp_group)


def summed(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs tensor parallelism sums over ranks."""
    return {
        name: module
        for name, module, style in _styled(model, _plan(model, "tp_plan"))
        if style in ("rowwise", "rowwise_split_input", "rowwise_rep", SLICES)
    }


def take_over(model: nn.Module, split: Split, wires: Wires) -> Forwards:
    """Replace the forward of every module that communicates, or would if the whole model were split."""
    forwards = Forwards()
    try:
        for name, module, style in _communicating(model, split):
            forwards.replace(module, style.forward(name, module, wires))
        for name, layer in _keeping(model, split).items():
            forwards.replace(layer, linear.kept_columns(name, layer, wires))
        if wires.feedback.readers:
            _take_over_norms(model, wires, forwards)
            _take_over_fused(model, wires, forwards)
        if wires.deterministic:
            for module in model.modules():
                if isinstance(module, DenseLinear | PackedLinear):
                    forwards.set(module, "batch_invariant", True)
        if type(wires) is Communicator:
            _take_over_replicated(model, forwards)
        _take_over_recorded(model, wires, forwards)
        if split.pp_size > 1:
            pipeline.take_over(model, split.pp_size, wires, forwards)
    except BaseException:
        forwards.restore()
        raise
    return forwards


def _take_over_replicated(model: nn.Module, forwards: Forwards) -> None:
    """Let norms of a rank's own heads, which the engine has given forwards for training, have those for steps."""
    for _, module, style in _styled(model, _plan(model, "tp_plan")):
        if style == REPLICATED and (forward := for_steps(module, model)) is not None:
            forwards.replace(module, forward)


def _take_over_recorded(model: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let decoder layers that are recorded have the sums of this rank in their schedules; virtual ranks have none."""
    for name, layer in model.named_modules():
        if not is_recorded(layer):
            continue
        if type(wires) is Communicator:
            forwards.set(layer, RECORDED, RecordedLayer(layer, name, wires))
        else:
            forwards.set(layer, "forward", Bound(type(layer).forward, layer))


def short_prompt(model: nn.Module, num_tokens: int) -> Tensor:
    """The logits [T, V] of tokens counted up, as far as the vocabulary goes."""
    module = cast(Any, model)
    ids = torch.arange(num_tokens, device=module.device) % module.config.get_text_config().vocab_size
    with torch.no_grad():
        logits: Tensor = module(input_ids=ids[None]).logits
    return logits[0]


def _take_over_fused(model: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let layers that are asked at once read what each would; virtual ranks, with inputs of their own, are not."""
    for parent, module in model.named_modules():
        for attribute, (first, *_) in FUSED.items():
            fused = None if isinstance(module, PackedExpert) else vars(module).get(attribute)  # which is given its own
            if fused is not None:
                forwards.set(module, attribute, linear.asked_at_once(f"{parent}.{first}", fused, wires))


def _take_over_norms(model: nn.Module, wires: Wires, forwards: Forwards) -> None:
    """Let norms read the stream as each rank knows it, for layers whose columns each rank keeps."""
    for name, module in model.named_modules():
        if name in wires.feedback.readers:
            forwards.replace(module, _reading(name, module.forward, wires))


def _reading(norm: str, forward: Forward, wires: Wires) -> Forward:
    return lambda stream: wires.read(norm, stream, forward)


def computing_shares(model: nn.Module, split: Split) -> Sequence[str]:
    """Linear layers that are split by columns, and experts that are not travelled to."""
    shared = [
        name
        for name, _, style in _communicating(model, split)
        if style is _columns or style.forward in (experts.slices, experts.whole_experts)
    ]
    return [*_keeping(model, split), *shared]


def shares_read(model: nn.Module, module: str) -> Tensor:
    """Sums of squares over the columns, and over experts."""
    weights = reading_weights(model.get_submodule(module))
    return torch.stack([each.detach().double().square().sum(dim=0) for each in weights]).sum(dim=0)


def check_shares(model: nn.Module, split: Split) -> None:
    """InvalidInputError unless each rank has whole heads."""
    config: Any = cast(Any, model).config.get_text_config()
    numbers = {"heads": by_layer(config, "num_attention_heads"), "KV heads": by_layer(config, "num_key_value_heads")}
    if any(number % split.tp_size for number in itertools.chain(*numbers.values()) if number):
        raise InvalidInputError(
            f"tp_size {split.tp_size}",
            expected="ranks that each have as many whole heads",
            found=in_words(numbers),
            remedy="Choose a number of ranks that divides both.",
        )


def _keeping(model: nn.Module, split: Split) -> dict[str, Any]:
    """Linear layers whose columns each rank keeps for itself."""
    if split.tp_size == 1:
        return {}
    styled = _styled(model, _plan(model, "tp_plan"))
    return {name: module for name, module, style in styled if style == KEPT_COLUMNS and is_linear(module)}


def _communicating(model: nn.Module, split: Split) -> list[tuple[str, nn.Module, Style]]:
    """Modules that communicate under `split`, with what serves them; InvalidInputError for what nothing serves."""
    if split.tp_size == 1:
        return []
    plan, table = _plan(model, "tp_plan"), STYLES
    if split.experts != "slices":
        ep_plan = _plan(model, "ep_plan")
        whole = tuple(name for name, style in ep_plan.items() if style == "ep_dispatch_experts")
        if not whole:
            raise InvalidInputError(
                type(model).__name__,
                expected=f"a mixture of experts, as experts={split.experts!r} says",
                found="a model without experts",
                remedy="Leave it out.",
            )
        plan = {name: style for name, style in plan.items() if not name.startswith(whole)} | ep_plan
        table = STYLES | {"ep_dispatch_experts": EXPERT_STYLES[split.experts]}
    found, is_split = [], bool(_meshes(model))
    for name, module, style in _styled(model, plan):
        if style in SILENT:
            continue
        if style not in table or not table[style].supports(module):
            raise _unsupported(
                model,
                "layers that are summed, gathered or looked up as in Llama, Gemma, Phi-3 or Mixtral",
                f"{name} of style {style!r} ({type(module).__name__})",
            )
        if not is_split and has_own_forward(module):
            raise _unsupported(model, "layers with the forwards of their classes", f"another one at {name}")
        if not all(is_plain(weight) for weight in module.parameters(recurse=False)):
            kinds = sorted({type(weight.data).__name__ for weight in module.parameters(recurse=False)})
            raise _unsupported(model, "weights that are plain tensors", f"{' and '.join(kinds)} in {name}")
        if style == "ep_dispatch_experts":
            experts.check_whole(name, module, split.tp_size)
        found.append((name, module, table[style]))
    return found


def _plan(model: nn.Module, kind: str) -> dict[str, str]:
    """The model's styles by name, layer numbers being stars; none for what is no model of its own."""
    return dict(getattr(model, kind, None) or {})


def _styled(model: nn.Module, plan: Mapping[str, str]) -> list[tuple[str, nn.Module, str]]:
    """The modules that the plan names. What another stage of a pipeline holds is not there."""
    named = [(name, module, plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))) for name, module in model.named_modules()]
    return [
        (name, module, style)
        for name, module, style in named
        if style is not None and type(module).__name__ != "PipelineIdentityLayer"
    ]


def _unsupported(model: nn.Module, expected: str, found: str) -> InvalidInputError:
    return InvalidInputError(
        type(model).__name__, expected=expected, found=found, remedy="This model is not supported yet."
    )


__all__ = [
    "OWN_COLUMNS",
    "SPLIT_COLUMNS",
    "SPLIT_ROWS",
    "WHOLE",
    "check_shares",
    "computing_shares",
    "groups",
    "halve_prompts",
    "shares_read",
    "short_prompt",
    "sites",
    "split_of",
    "styles_of",
    "summed",
    "take_over",
]
