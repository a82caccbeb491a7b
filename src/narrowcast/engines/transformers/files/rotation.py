"""Rotated models: an orthogonal matrix folded into every weight that reads or writes the residual stream.

What that is, one short run shows. Norms of the stream are children of the decoder layers, and the one before the output
layer; what takes a norm's output as it is, reads the stream; what the engine sums over ranks, writes it. Each kind of
layer is then tried in FP32: rotated, it must answer a rotated stream with the rotated answer. What fails is refused
before any weight has changed.

Shapes: E features of the stream, O outputs, I inputs, X experts, T tokens.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from narrowcast.engines.forwards import evaluating
from narrowcast.engines.transformers.sharding import is_experts, is_linear
from narrowcast.errors import InvalidInputError

NUM_TRIED = 8  # tokens of the short run
TOLERANCE = 1e-3  # of what a layer adds: FP32 errors are about 1e-6, a layer that does not commute is off by about 1


@dataclass
class Stream:
    """The residual stream as a short run saw it, by names of modules.

    `readers`: those that took a norm's output, by norm. `layers`: the keyword arguments that each was called with.
    `embedded`: what the embedding returned, and what the first layer took.
    """

    norms: Sequence[str]
    readers: dict[str, list[str]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    embedded: list[Tensor] = field(default_factory=list)
    _returned: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # alive, so that none takes another's place

    def norm_returns(self, name: str, x: Tensor) -> None:
        self._returned[x.data_ptr()] = name, x

    def module_takes(self, name: str, x: Tensor, kwargs: Mapping[str, Any]) -> None:
        if x.data_ptr() in self._returned:
            norm, _ = self._returned[x.data_ptr()]
            self.readers.setdefault(norm, []).append(name)

    def layer_takes(self, name: str, x: Tensor, kwargs: Mapping[str, Any]) -> None:
        if not self.layers:
            self.embedded.append(x)
        self.layers[name] = dict(kwargs)

    @property
    def all_readers(self) -> list[str]:
        return [name for names in self.readers.values() for name in names]


def rotate(model: Any, writers: Collection[str], rotation_EE: Tensor) -> None:
    """Fold `rotation_EE` into a whole model's weights, in place; `writers` are the modules whose outputs are summed.

    Gains of norms go into what reads them; a tied output layer gets weights of its own. InvalidInputError, and the
    model as it was, where the rotated model would answer otherwise.
    """
    stream = _watched(model)
    _check_ends(model, stream)
    _check_weights(model, stream, writers)
    tried = set()
    for name in stream.layers:
        if (kind := _structure(model.get_submodule(name))) not in tried:
            _check_commutes(model, name, stream, writers, rotation_EE)
            tried.add(kind)
    _untie(model)
    _fold(model, stream.readers, writers, rotation_EE)
    embedding = model.get_input_embeddings().weight
    _round_into(embedding, _precise(embedding) @ _like(rotation_EE, embedding))


def _watched(model: Any) -> Stream:
    """The stream that a few tokens take."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        _refuse(model, "decoder layers in a list named layers", "none")
    names = [f"{model.base_model_prefix}.layers.{number}" for number in range(len(layers))]
    stream = Stream([norm for home in (model.base_model_prefix, *names) for norm in _norms(model, home)])
    embedding = model.get_input_embeddings()
    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if name in names:
                hook = _before(module, name, stream.layer_takes)
            elif name in stream.norms:
                hook = _after(module, partial(stream.norm_returns, name))
            elif module is embedding:
                hook = _after(module, stream.embedded.append)
            elif _may_read(module):
                hook = _before(module, name, stream.module_takes)
            else:
                continue
            hooks.callback(hook.remove)
        ids = torch.arange(NUM_TRIED, device=embedding.weight.device) % len(embedding.weight)
        model(input_ids=ids[None], use_cache=False)
    return stream


def _before(module: nn.Module, name: str, see: Callable[[str, Tensor, Mapping[str, Any]], None]) -> RemovableHandle:
    """Let `see` know what `module` takes: its first argument, and others by name."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        see(name, first, {key: value for key, value in kwargs.items() if value is not first})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Let `see` know what `module` returns."""
    return module.register_forward_hook(lambda _, args, x: see(x))


def _norms(model: nn.Module, home: str) -> list[str]:
    """Norms among the children of a module: they say so, or have nothing but vectors."""
    children = ((f"{home}.{name}", child) for name, child in model.get_submodule(home).named_children())
    return [name for name, child in children if not list(child.children()) and _is_norm(child)]


def _is_norm(module: nn.Module) -> bool:
    weights = list(module.parameters())
    return all(weight.ndim == 1 for weight in weights) and (bool(weights) or "Norm" in type(module).__name__)


def _may_read(module: nn.Module) -> bool:
    """Experts, and whatever has weights and no parts."""
    is_leaf = not list(module.children()) and any(weight.ndim > 1 for weight in module.parameters())
    return is_leaf or is_experts(module)


def _check_ends(model: Any, stream: Stream) -> None:
    """Between embedding and first layer there is a factor at most, and nothing else outside the layers has weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        _refuse(model, "an embedding that looks rows up", type(embedding).__name__)
    found, taken = (x.float().flatten() for x in stream.embedded)
    if (taken - taken @ found / (found @ found) * found).norm() > 0.02 * taken.norm():  # roundings of BF16 are 0.004
        _refuse(model, "the embedding as the first layer's input", "one that is changed on the way")
    ends = {id(weight) for module in (embedding, head) for weight in module.parameters()}
    inside = tuple(f"{name}." for name in (*stream.layers, *stream.norms))
    for name, weight in model.named_parameters():
        if id(weight) not in ends and not name.startswith(inside):
            _refuse(model, "weights in embedding, layers, final norm and output layer alone", name)
    (name,) = (name for name, module in model.named_modules() if module is head)
    if name not in stream.all_readers:
        _refuse(model, "an output layer that reads a norm", name)


def _check_weights(model: nn.Module, stream: Stream, writers: Collection[str]) -> None:
    for name in stream.norms:
        if not stream.readers.get(name):
            _refuse(
                model,
                "norms before what reads the residual stream, which rotations pass through",
                f"{name}, whose output no layer reads: it normalizes what is added to the stream",
            )
        _offset(name, model.get_submodule(name))
    for name in (*writers, *stream.all_readers):
        module = model.get_submodule(name)
        if not _is_plain(module) or not all(
            type(each.data) is Tensor and each.is_floating_point() for each in module.parameters()
        ):
            _refuse(model, "plain floating-point weights", f"{name} ({type(module).__name__})")


def _is_plain(module: nn.Module) -> bool:
    """A linear layer or experts as they should be, or a router: one weight [X, E] besides what is added behind it."""
    if isinstance(module, nn.Linear):
        return is_linear(module)
    if is_experts(module):
        return True
    return [name for name, weight in module.named_parameters() if weight.ndim > 1] == ["weight"]


def _offset(name: str, norm: nn.Module) -> float:
    """The constant that makes a norm's weight its gain: 1 as in Gemma, or 0. InvalidInputError for no RMS norm."""
    tried: Any = copy.deepcopy(norm).float()
    if [each for each, _ in tried.named_parameters()] == ["weight"]:
        x_TE = _random(2, tried.weight) + 1  # with a mean, which LayerNorm subtracts
        unit_TE = x_TE * x_TE.pow(2).mean(dim=-1, keepdim=True).rsqrt()
        for offset in (0.0, 1.0):
            expected = unit_TE * (tried.weight + offset)
            if (tried(x_TE) - expected).norm() <= TOLERANCE * expected.norm():
                return offset
    _refuse(name, "an RMS norm, which commutes with rotations", type(norm).__name__)


def _structure(layer: nn.Module) -> tuple[object, ...]:
    weights = tuple((name, weight.shape) for name, weight in layer.named_parameters())
    return weights, tuple((name, type(module)) for name, module in layer.named_modules())


@torch.no_grad()
def _check_commutes(model: nn.Module, name: str, stream: Stream, writers: Collection[str], rotation_EE: Tensor) -> None:
    """A layer, rotated, answers a rotated stream with the rotated answer."""
    whole: Any = copy.deepcopy(model.get_submodule(name)).float().eval()
    rotated: Any = copy.deepcopy(whole)
    here = f"{name}."
    readers = {
        norm.removeprefix(here): [each.removeprefix(here) for each in reading]
        for norm, reading in stream.readers.items()
        if norm.startswith(here)
    }
    _fold(rotated, readers, [each.removeprefix(here) for each in writers if each.startswith(here)], rotation_EE)
    rotation_EE = rotation_EE.to(stream.embedded[0].device, torch.float32)
    x_TE = _random(NUM_TRIED, rotation_EE)[None]
    kwargs = _in_fp32(stream.layers[name])
    before, after = (_first(layer(x, **kwargs)) for layer, x in ((whole, x_TE), (rotated, x_TE @ rotation_EE)))
    error = ((after - before @ rotation_EE).norm() / (before - x_TE).norm()).item()
    if not error <= TOLERANCE:
        _refuse(
            model,
            "layers that commute with rotations of the residual stream",
            f"{name}, whose answer is off by {error:.0%}",
        )


def _in_fp32(value: Any) -> Any:
    """Tensors among a call's arguments in FP32, unless they are integers or masks."""
    if isinstance(value, Mapping):
        return {key: _in_fp32(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_in_fp32, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _random(num_tokens: int, like: Tensor) -> Tensor:
    """Values [T, E] of about 1, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, like.shape[-1], generator=generator).to(like.device)


def _untie(model: Any) -> None:
    """The final norm's gain goes into the output layer, and not into the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def _fold(root: nn.Module, readers: Mapping[str, Sequence[str]], writers: Collection[str], rotation_EE: Tensor) -> None:
    """Gains [E] and the rotation into readers [O, E] or [X, O, E], the rotation into writers [E, I] or [X, E, I]."""
    for name, reading in readers.items():
        norm: Any = root.get_submodule(name)
        offset = _offset(name, norm)
        gain_E = _precise(norm.weight) + offset
        for reader in reading:
            weight = _weight(root.get_submodule(reader), "gate_up_proj")
            _round_into(weight, _precise(weight) * _like(gain_E, weight) @ _like(rotation_EE, weight))
        _round_into(norm.weight, torch.full_like(gain_E, 1 - offset))
    for writer in writers:
        module: Any = root.get_submodule(writer)
        weight = _weight(module, "down_proj")
        _round_into(weight, _like(rotation_EE, weight).T @ _precise(weight))
        if (bias := getattr(module, "bias", None)) is not None:
            _round_into(bias, _precise(bias) @ _like(rotation_EE, bias))


def _weight(module: Any, of_experts: str) -> Tensor:
    return cast(Tensor, getattr(module, of_experts) if is_experts(module) else module.weight)


def _precise(weight: Tensor) -> Tensor:
    """The weight in the type in which its rotation is computed, far more precise than its own."""
    return weight.detach().to(torch.float64 if weight.dtype == torch.float32 else torch.float32)


def _like(values: Tensor, weight: Tensor) -> Tensor:
    return values.to(_precise(weight[:0]))


@torch.no_grad()
def _round_into(weight: Tensor, values: Tensor) -> None:
    weight.copy_(values)


def _refuse(subject: nn.Module | str, expected: str, found: str) -> NoReturn:
    name = subject if isinstance(subject, str) else type(subject).__name__
    raise InvalidInputError(
        name, expected=expected, found=found, remedy="Use the model as it is: it cannot be rotated."
    )
