"""Loading models whose weights stay in few bits: each rank reads its own rows and columns, and nothing is unpacked."""

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowcast.engines.base import Weights
from narrowcast.engines.forwards import chunk
from narrowcast.engines.identity import digest, sample_places
from narrowcast.engines.transformers.files.claims import check_shapes
from narrowcast.engines.transformers.files.fingerprint import sampled
from narrowcast.engines.transformers.files.settling import settle
from narrowcast.engines.transformers.files.streaming import stream
from narrowcast.engines.transformers.seam import SPLIT_COLUMNS, SPLIT_ROWS, WHOLE, styles_of
from narrowcast.engines.transformers.sharding import is_experts, own_chunk
from narrowcast.errors import InvalidInputError, MissingDependencyError
from narrowcast.progress import Progress, tell
from narrowcast.weights.checkpoint import ALL, Checkpoint
from narrowcast.weights.folders import writing
from narrowcast.weights.folders.kernels import KernelsFolder
from narrowcast.weights.formats import Q4_0, Q8_0, GroupedCodes, WeightFormat
from narrowcast.weights.layers import PackedEmbedding, PackedLinear
from narrowcast.weights.packed import PackedMatrix, check_columns, rows_at_a_time
from narrowcast.weights.quantize import quantize_int4, quantize_int8

logger = logging.getLogger(__name__)


class Quantizer(NamedTuple):
    """Makes codes of values."""

    format: WeightFormat
    quantize: Callable[[Tensor], GroupedCodes]


QUANTIZERS: Mapping[str, Quantizer] = {
    "int4-group32": Quantizer(Q4_0, quantize_int4),
    "int8-group32": Quantizer(Q8_0, quantize_int8),
}
LEFT_OUT = "rotary_emb.inv_freq"  # computed, though old checkpoints have it
PackedLayer = PackedLinear | PackedEmbedding


class PackedModel:
    """A checkpoint on its way into a model. `weights`: the format for matrices that the checkpoint has as values."""

    def __init__(self, path: str | Path, checkpoint: Checkpoint, weights: Weights) -> None:
        self._path, self._checkpoint = path, checkpoint
        self._quantizer = QUANTIZERS.get(weights)
        self._output = ""  # the parameter that gives logits
        self._dense = weights == "dense"
        self._in_place = checkpoint if isinstance(checkpoint, KernelsFolder) and not self._dense else None

    def load(self, config: Any, dtype: torch.dtype, distributed_config: Any = None) -> nn.Module:
        """The causal LM, or this rank's part of it; activations are of `dtype`.

        InvalidInputError for weights that are missing or have other shapes than the config says, and for a split that
        cuts groups of columns.
        """
        model = self._prepared(config, dtype)
        self._set_frequencies(model)
        mesh = None
        if distributed_config is not None:
            kind = cast(Any, type(model))
            distributed_config, _, mesh = kind.prepare_distribute_model(distributed_config)
            model = kind.maybe_distribute_model(model, distributed_config, mesh)
        self._fill(model, None if mesh is None else mesh.get_mesh("tp"))
        settle(model, in_place=self._in_place is not None)
        self._check_found(name for name, weight in model.named_parameters() if weight.is_meta)
        if self._in_place is not None:
            stream(model, self._in_place.file)
        return model.eval()

    def write(self, config: Any, path: Path) -> None:
        """Write a file whose matrices kernels read where they lie, some rows at a time.

        InvalidInputError as of `load`, and if no matrix is in few bits.
        """
        model = self._prepared(config, torch.bfloat16)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
        if not layers:
            raise self._refusal("weights in few bits", "values of 16 bits or more", "Pass --weights int4-group32, say.")
        sources = list(self._sources(model, _tied(model)))
        digests: dict[str, list[str]] = {}
        for name in filter(layers.__contains__, sampled(model)):
            source = self._source(f"{name}.weight", _tied(model))
            assert source is not None
            digests[f"{name}.weight"] = list(self._digests(name, source, layers[name], WHOLE, None).values())
        divisors = getattr(self._checkpoint, "frequency_divisors", None)
        writing.write(path, sources, digests, [] if divisors is None else divisors.tolist())

    def _sources(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[writing.Source]:
        """All parameters of the checkpoint, each once, in the order in which they are computed with."""
        seen = set()
        for name, module in model.named_modules():
            shapes = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}
            if is_packed := isinstance(module, PackedLayer):
                shapes["weight"] = _shape(module)
            for key, shape in shapes.items():
                source = self._source(f"{name}.{key}", tied)
                self._check_found([] if source else [f"{name}.{key}"])
                assert source is not None
                if source not in seen:
                    read = self._codes if is_packed and key == "weight" else self._checkpoint.values
                    yield writing.Source(source, shape, functools.partial(read, source))
                seen.add(source)

    def _prepared(self, config: Any, dtype: torch.dtype) -> nn.Module:
        """The model without weights, with layers for such in few bits."""
        with torch.device("meta"):  # buffers, too: shapes may be anything
            skeleton = _made(config, dtype)
        self.check_without_experts(skeleton)
        self._check_place_for_all(skeleton)
        check_shapes(self._path, skeleton, self._checkpoint.names, self._checkpoint.shape)
        model = _empty(config, dtype)
        self._put_layers(model, dtype)
        return model

    def check_without_experts(self, model: nn.Module) -> None:
        """InvalidInputError for experts, which have no kernels in few bits."""
        if any(is_experts(module) for module in model.modules()):
            raise self._refusal("a model without experts", "a mixture of experts", "Pass --weights dense.")

    def _check_place_for_all(self, model: nn.Module) -> None:
        """InvalidInputError for weights of the checkpoint that the model would leave out."""
        known = model.state_dict().keys() | _tied(model).keys()
        strangers = sorted(name for name in set(self._checkpoint.names) - known if not name.endswith(LEFT_OUT))
        if strangers:
            raise self._refusal(
                f"weights that a {type(model).__name__} of its config has",
                strangers[0] + (f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""),
                "Use a folder of safetensors of this model.",
            )

    def _set_frequencies(self, model: nn.Module) -> None:
        """Positions as a GGUF file has them, of which its config says nothing."""
        if (divisors := getattr(self._checkpoint, "frequency_divisors", None)) is None:
            return
        rotary = cast(Any, model).base_model.rotary_emb
        if rotary.inv_freq.shape != divisors.shape:
            raise self._refusal(f"{len(rotary.inv_freq)} rotary frequencies", str(len(divisors)), "Copy it again.")
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / divisors

    def formats(self, model: nn.Module) -> dict[str, WeightFormat]:
        """The formats of the layers that keep their matrix in few bits, by name; of a skeleton too."""
        styles, tied = styles_of(model), _tied(model)
        output = cast(Any, model).get_output_embeddings()
        self._output = next((f"{name}.weight" for name, module in model.named_modules() if module is output), "")
        self._output = self._source(self._output, tied) or ""
        found = {}
        for name, module in model.named_modules():
            source = self._source(f"{name}.weight", tied)
            if source is None or (form := self._format(source)) is None:
                continue
            splits = styles.get(name, WHOLE) in (WHOLE, SPLIT_ROWS, SPLIT_COLUMNS)
            is_linear, is_embedding = type(module) is nn.Linear and splits, isinstance(module, nn.Embedding)
            if is_linear or (is_embedding and self._keeps_embedding(source, tied)):
                found[name] = form
        return found

    def _put_layers(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give the model layers for matrices in few bits."""
        formats = self.formats(model)
        self._tell_what_stays(model, formats)
        for name in formats:
            module: Any = model.get_submodule(name)
            layer: PackedLayer
            if isinstance(module, nn.Linear):
                layer = PackedLinear(module.in_features, module.out_features, module.bias)
            else:
                scale = getattr(module, "embed_scale", None)
                layer = PackedEmbedding(module.num_embeddings, module.embedding_dim, dtype, scale)
            model.set_submodule(name, layer)

    def _tell_what_stays(self, model: nn.Module, formats: Collection[str]) -> None:
        """Log the linear layers that were asked for in few bits and cannot be."""
        if self._quantizer is None:
            return
        size, layers = self._quantizer.format.group_size, model.named_modules()
        left = [name for name, each in layers if isinstance(each, nn.Linear) and each.in_features % size]
        if stay := [name for name in left if name not in formats]:
            others = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
            reason = f"their columns are no multiple of {size}"
            logger.warning("%s: %s%s stay in values, as %s", self._path, stay[0], others, reason)

    def _source(self, parameter: str, tied: Mapping[str, str]) -> str | None:
        """The checkpoint's name of a parameter, which may be another one that it shares; None if it has neither."""
        names = self._checkpoint.names
        return next((name for name in (parameter, tied.get(parameter)) if name in names), None)

    def _format(self, source: str) -> WeightFormat | None:
        """The format to keep a matrix in; None for values."""
        if self._dense:
            return None
        if (stored := self._checkpoint.format(source)) is not None:
            return stored
        shape = self._checkpoint.shape(source)
        if (quantizer := self._quantizer_of(source)) is None or len(shape) != 2:
            return None
        return None if shape[1] % quantizer.format.group_size else quantizer.format

    def _quantizer_of(self, source: str) -> Quantizer | None:
        """Logits want 8 bits: SmolLM2 in 4, output layer included, has a fifth more KL divergence."""
        return QUANTIZERS["int8-group32"] if self._quantizer and source == self._output else self._quantizer

    def _keeps_embedding(self, source: str, tied: Mapping[str, str]) -> bool:
        """True where the file has it in few bits, or it is the output layer too: looking up reads next to nothing."""
        return self._checkpoint.format(source) is not None or source in tied.values()

    def _fill(self, model: nn.Module, mesh: Any) -> None:
        styles, tied, matrices = styles_of(model), _tied(model), {}
        modules, told_by = dict(model.named_modules()), sampled(model)
        for done, (name, module) in enumerate(modules.items()):
            tell(Progress(f"reading {self._path}", done, len(modules)))
            if isinstance(module, PackedLayer):
                source = self._source(f"{name}.weight", tied)
                assert source is not None
                style = styles.get(name, WHOLE) if mesh is not None else WHOLE
                if (source, style) not in matrices:
                    matrices[source, style] = self._read(name, source, module, style, mesh)
                _set(module, matrices[source, style], style, mesh)
                if name in told_by:
                    module.samples = self._digests(name, source, module, style, mesh)
            for key, weight in list(module.named_parameters(recurse=False)):
                if weight.is_meta and (source := self._source(f"{name}.{key}", tied)) is not None:
                    module.register_parameter(key, self._values(source, weight))

    def _read(self, name: str, source: str, module: PackedLayer, style: str, mesh: Any) -> PackedMatrix:
        """The matrix that this rank holds, read some rows at a time."""
        shape, form = _shape(module), self._format(source)
        assert form is not None
        rows, columns = _own(shape, style, mesh)
        check_columns(name, form, columns, shape[1], 1 if mesh is None else mesh.size())
        if self._in_place is not None and (matrix := self._in_place.matrix(source, rows, columns)) is not None:
            return matrix
        matrix = None
        for part in rows_at_a_time(rows, columns.stop - columns.start):
            codes = self._codes(source, part, columns)
            if matrix is None:
                held = rows.stop - rows.start, columns.stop - columns.start
                scale = float(codes.scales) if form.is_ternary else 1.0
                matrix = PackedMatrix.empty(form, held, bf16_scales=codes.scales.dtype == torch.bfloat16, scale=scale)
            matrix.fill(part.start - rows.start, codes)
        assert matrix is not None
        return matrix

    def _codes(self, source: str, rows: slice, columns: slice = ALL) -> GroupedCodes:
        if self._checkpoint.format(source) is not None:
            return self._checkpoint.codes(source, rows, columns)
        quantizer = self._quantizer_of(source)
        assert quantizer is not None
        return quantizer.quantize(self._checkpoint.values(source, rows, columns))

    def _digests(self, name: str, source: str, module: PackedLayer, style: str, mesh: Any) -> dict[int, str]:
        """By place of those samples that this rank holds: of a linear layer columns, of an embedding rows."""
        rows, columns = _own(_shape(module), style, mesh)
        axis, own = (0, rows) if isinstance(module, PackedEmbedding) else (1, columns)
        places = sample_places(_shape(module)[axis])
        held = [place for place in places if own.start <= place < own.stop]
        if isinstance(self._checkpoint, KernelsFolder):
            kept = dict(zip(places, self._checkpoint.digests.get(f"{name}.weight", ()), strict=False))
            return {place: kept[place] for place in held if place in kept}
        if axis == 0:
            return {place: digest(self._values_of(source, slice(place, place + 1), columns)) for place in held}
        return {place: digest(self._values_of(source, rows, slice(place, place + 1))) for place in held}

    def _values_of(self, source: str, rows: slice, columns: slice) -> Tensor:
        """Values of a few columns, of which files have whole groups."""
        size = 1 if (form := self._checkpoint.format(source)) is None else form.group_size
        first = columns.start // size * size
        whole = self._checkpoint.values(source, rows, slice(first, -(-columns.stop // size) * size))
        return whole[:, columns.start - first : columns.stop - first].bfloat16()

    def _values(self, source: str, weight: nn.Parameter) -> nn.Parameter:
        """A parameter that is kept in values, or this rank's part of it."""
        own = [own_chunk(weight.data, axis) for axis in range(weight.ndim)]
        rows, columns = (own[0], own[-1]) if weight.ndim > 1 else (own[0], slice(None))
        values = self._checkpoint.values(source, rows, columns).to(weight.dtype)
        for axis in range(1, weight.ndim - 1):
            values = values.narrow(axis, own[axis].start, own[axis].stop - own[axis].start)
        if not isinstance(weight.data, DTensor):
            return nn.Parameter(values, requires_grad=False)
        spread = weight.data
        part = DTensor.from_local(
            values.contiguous(),
            spread.device_mesh,
            spread.placements,
            run_check=False,
            shape=spread.shape,
            stride=spread.stride(),
        )
        return nn.Parameter(part, requires_grad=False)

    def _check_found(self, parameters: Iterable[str]) -> None:
        """InvalidInputError if there are parameters that the checkpoint has nothing for."""
        if missing := list(parameters):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise self._refusal(
                "all weights of its config", f"none for {missing[0]}{more}", "Copy or download it again."
            )

    def _refusal(self, expected: str, found: str, remedy: str) -> InvalidInputError:
        return InvalidInputError(f"model {self._path}", expected=expected, found=found, remedy=remedy)


def _empty(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model without weights; buffers, which no file has, are there."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise MissingDependencyError("accelerate", "transformers") from error
    with init_empty_weights(include_buffers=False):
        return _made(config, dtype)


def _made(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with _without_quantization(config):
        return cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=dtype))


@contextlib.contextmanager
def _without_quantization(config: Any) -> Iterator[None]:
    """The engine has quantizers of its own for what a config may ask for."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    yield


def _tied(model: nn.Module) -> dict[str, str]:
    """The parameters that another one stands for."""
    module = cast(Any, model)
    if not module.config.get_text_config().tie_word_embeddings:
        return {}
    embedding, output = module.get_input_embeddings(), module.get_output_embeddings()
    names = {id(layer): name for name, layer in model.named_modules()}
    if output is None or id(embedding) not in names:  # another stage of a pipeline has it
        return {}
    return {f"{names[id(output)]}.weight": f"{names[id(embedding)]}.weight"}


def _shape(module: PackedLayer) -> tuple[int, int]:
    if isinstance(module, PackedLinear):
        return module.out_features, module.in_features
    return module.num_embeddings, module.embedding_dim


def _own(shape: tuple[int, int], style: str, mesh: Any) -> tuple[slice, slice]:
    """The rows and columns that this rank holds."""
    whole = tuple(slice(0, size) for size in shape)
    if mesh is None or style == WHOLE:
        return cast(tuple[slice, slice], whole)
    own = [chunk(size, mesh.get_local_rank(), mesh.size()) for size in shape]
    return (own[0], whole[1]) if style == SPLIT_ROWS else (whole[0], own[1])


def _set(module: PackedLayer, matrix: PackedMatrix, style: str, mesh: Any) -> None:
    module.matrix, module.device_mesh = matrix, mesh
    if isinstance(module, PackedEmbedding):
        module.own = _own(_shape(module), style, mesh)[0]
