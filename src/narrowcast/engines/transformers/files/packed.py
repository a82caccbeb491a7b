"""Loading models whose weights stay in few bits: each rank reads its own rows and columns, and nothing is unpacked."""

import functools
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowcast.engines.base import Weights
from narrowcast.engines.forwards import chunk
from narrowcast.engines.identity import NUM_SAMPLES, digest, sample_places
from narrowcast.engines.transformers.files.claims import check_shapes
from narrowcast.engines.transformers.files.empty import empty, made, tied_parameters
from narrowcast.engines.transformers.files.experts import ByExpert, shapes_by_expert
from narrowcast.engines.transformers.files.fingerprint import sampled
from narrowcast.engines.transformers.files.kept import Kept
from narrowcast.engines.transformers.files.settling import settle
from narrowcast.engines.transformers.files.streaming import stream
from narrowcast.engines.transformers.seam import SPLIT_COLUMNS, SPLIT_ROWS, WHOLE, styles_of
from narrowcast.engines.transformers.sharding import EXPERT_WEIGHTS, is_experts, is_packed, own_chunk, own_runs
from narrowcast.errors import InvalidInputError
from narrowcast.progress import Progress, tell
from narrowcast.weights.arena import CHUNK, Arena
from narrowcast.weights.checkpoint import Checkpoint
from narrowcast.weights.experts import PackedExperts, layer_names
from narrowcast.weights.folders import writing
from narrowcast.weights.folders.kernels import KernelsFolder
from narrowcast.weights.formats import WeightFormat
from narrowcast.weights.layers import PackedEmbedding, PackedLinear
from narrowcast.weights.packed import PackedMatrix, check_columns, packed_shape, rows_at_a_time

logger = logging.getLogger(__name__)

LEFT_OUT = "rotary_emb.inv_freq"  # computed, though old checkpoints have it
PackedLayer = PackedLinear | PackedEmbedding
ToldBySamples = PackedLayer | PackedExperts
Key = tuple[object, ...]


class Part(NamedTuple):
    """Rows and columns of a matrix of the checkpoint, and the format that they are kept in."""

    source: str
    format: WeightFormat
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """That of the part."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def key(self) -> Key:
        """The same for what can be one matrix in memory."""
        return self.source, self.rows.start, self.columns.start, self.shape

    @property
    def nbytes(self) -> int:
        """Packed."""
        return math.prod(packed_shape(self.format, self.shape))


class PackedModel:
    """A checkpoint on its way into a model. `weights`: the format for matrices that the checkpoint has as values."""

    def __init__(self, path: str | Path, checkpoint: Checkpoint, weights: Weights) -> None:
        self._path, self._files, self._checkpoint = path, checkpoint, ByExpert(checkpoint)
        self._kept = Kept(self._checkpoint, weights)
        self._kernels = checkpoint if isinstance(checkpoint, KernelsFolder) else None
        self._in_place = None if self._kept.is_dense else self._kernels

    def load(self, config: Any, dtype: torch.dtype, distributed_config: Any = None) -> nn.Module:
        """The causal LM, or this rank's part of it; activations are of `dtype`.

        InvalidInputError for weights that are missing or have other shapes than the config says, and for a split that
        cuts groups of columns.
        """
        model = self._prepared(config, dtype)
        if getattr(distributed_config, "ep_size", 1) > 1:
            self._check_without_packed_experts(model)
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
        if not any(isinstance(module, PackedLayer) for module in model.modules()):
            raise self._refusal("weights in few bits", "values of 16 bits or more", "Pass --weights int4-group32, say.")
        tied, digests = tied_parameters(model), {}
        sources = list(self._sources(model, tied))
        for name, module in sampled(model).items():
            if isinstance(module, ToldBySamples):
                (first, *_) = _sampled_layers(name, module)
                digests[f"{first}.weight"] = list(self._digests(name, module, {}, tied, None).values())
        divisors = getattr(self._files, "frequency_divisors", None)
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
                    read = self._kept.codes if is_packed and key == "weight" else self._checkpoint.values
                    yield writing.Source(source, shape, functools.partial(read, source))
                seen.add(source)

    def _prepared(self, config: Any, dtype: torch.dtype) -> nn.Module:
        """The model without weights, with layers for such in few bits."""
        with torch.device("meta"):  # buffers, too: shapes may be anything
            skeleton = made(config, dtype)
        self._check_place_for_all(skeleton)
        self._check_each_expert(skeleton)
        check_shapes(self._path, skeleton, self._checkpoint.names, self._checkpoint.shape)
        model = empty(config, dtype)
        self._put_layers(model, dtype)
        return model

    def _check_without_packed_experts(self, model: nn.Module) -> None:
        """InvalidInputError for experts in few bits, which ranks share out in slices alone."""
        if any(isinstance(module, PackedExperts) for module in model.modules()):
            raise self._refusal(
                "slices of each expert on every rank, or whole experts in values",
                "whole experts in few bits",
                "Leave out experts, or pass --weights dense.",
            )

    def _check_each_expert(self, model: nn.Module) -> None:
        """InvalidInputError for a matrix of another shape than the engine's module of experts has."""
        names = set(self._checkpoint.names)
        for name, module in model.named_modules():
            shapes = shapes_by_expert(name, module) if is_experts(module) else {}
            for matrix in sorted(shapes.keys() & names):
                if (found := self._checkpoint.shape(matrix)) != shapes[matrix]:
                    raise self._refusal(
                        f"{matrix} of shape {shapes[matrix]}, as its config says", str(found), "Copy it again."
                    )

    def _check_place_for_all(self, model: nn.Module) -> None:
        """InvalidInputError for weights of the checkpoint that the model would leave out."""
        known = model.state_dict().keys() | tied_parameters(model).keys()
        held = {name for name in self._checkpoint.names if self._checkpoint.parameter(name) not in known}
        strangers = sorted(name for name in held if not name.endswith(LEFT_OUT))
        if strangers:
            raise self._refusal(
                f"weights that a {type(model).__name__} of its config has",
                strangers[0] + (f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""),
                "Use a folder of safetensors of this model.",
            )

    def _set_frequencies(self, model: nn.Module) -> None:
        """Positions as a GGUF file has them, of which its config says nothing."""
        if (divisors := getattr(self._files, "frequency_divisors", None)) is None:
            return
        rotary = cast(Any, model).base_model.rotary_emb
        if rotary.inv_freq.shape != divisors.shape:
            raise self._refusal(f"{len(rotary.inv_freq)} rotary frequencies", str(len(divisors)), "Copy it again.")
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / divisors

    def formats(self, model: nn.Module) -> dict[str, WeightFormat]:
        """The formats of the layers that keep their matrix in few bits, by name; of a skeleton too.

        Layers of experts have the names of `layer_names`.
        """
        styles, tied = styles_of(model), tied_parameters(model)
        output = cast(Any, model).get_output_embeddings()
        logits = next((f"{name}.weight" for name, module in model.named_modules() if module is output), "")
        self._kept.output = self._source(logits, tied) or ""
        found: dict[str, WeightFormat] = {}
        for name, module in model.named_modules():
            if is_experts(module):
                found |= self._formats_of_experts(name, cast(Any, module).num_experts)
            source = self._source(f"{name}.weight", tied)
            if source is None or (form := self._kept.format(source)) is None:
                continue
            splits = styles.get(name, WHOLE) in (WHOLE, SPLIT_ROWS, SPLIT_COLUMNS)
            is_linear, is_embedding = type(module) is nn.Linear and splits, isinstance(module, nn.Embedding)
            if is_linear or (is_embedding and self._keeps_embedding(source, tied)):
                found[name] = form
        return found

    def _formats_of_experts(self, experts: str, num_experts: int) -> dict[str, WeightFormat]:
        """Those of all layers of a module of experts; of none where one has to stay in values."""
        layers = [layer for weight in EXPERT_WEIGHTS for layer in layer_names(experts, weight, num_experts)]
        known = (layer for layer in layers if f"{layer}.weight" in self._checkpoint.names)
        found = {layer: form for layer in known if (form := self._kept.format(f"{layer}.weight")) is not None}
        return found if len(found) == len(layers) else {}

    def _put_layers(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give the model layers for matrices in few bits."""
        formats = self.formats(model)
        self._tell_what_stays(model, formats)
        module: Any
        for name, module in list(model.named_modules()):
            layer: nn.Module
            if is_experts(module) and f"{name}.0.down_proj" in formats:
                num_experts, num_features, num_hidden = module.down_proj.shape
                layer = PackedExperts(num_experts, num_features, num_hidden, module.act_fn)
            elif name not in formats:
                continue
            elif isinstance(module, nn.Linear):
                layer = PackedLinear(module.in_features, module.out_features, module.bias)
            else:
                scale = getattr(module, "embed_scale", None)
                layer = PackedEmbedding(module.num_embeddings, module.embedding_dim, dtype, scale)
            model.set_submodule(name, layer)

    def _tell_what_stays(self, model: nn.Module, formats: Collection[str]) -> None:
        """Log the linear layers, and experts, that were asked for in few bits and cannot be."""
        if (size := self._kept.group_size) is None:
            return
        left = [
            name for name, each in model.named_modules() if any(num_columns % size for num_columns in _columns(each))
        ]
        if stay := [name for name in left if not {name, f"{name}.0.down_proj"} & {*formats}]:
            others = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
            reason = f"their columns are no multiple of {size}"
            logger.warning("%s: %s%s stay in values, as %s", self._path, stay[0], others, reason)

    def _source(self, parameter: str, tied: Mapping[str, str]) -> str | None:
        """The checkpoint's name of a parameter, which may be another one that it shares; None if it has neither."""
        names = self._checkpoint.names
        return next((name for name in (parameter, tied.get(parameter)) if name in names), None)

    def _keeps_embedding(self, source: str, tied: Mapping[str, str]) -> bool:
        """True where the file has it in few bits, or it is the output layer too: looking up reads next to nothing."""
        return self._checkpoint.format(source) is not None or source in tied.values()

    def _fill(self, model: nn.Module, mesh: Any) -> None:
        styles, tied = styles_of(model), tied_parameters(model)
        modules, told_by = dict(model.named_modules()), sampled(model)
        parts = {name: self._part(name, each, styles, tied, mesh) for name, each in modules.items() if is_packed(each)}
        sizes = {part.key: part.nbytes for part in parts.values()}
        arena = Arena(CHUNK if self._in_place else sum(sizes.values()))  # in one, neighbours are rows of one matrix
        matrices: dict[Key, PackedMatrix] = {}
        for done, (name, module) in enumerate(modules.items()):
            tell(Progress(f"reading {self._path}", done, len(modules)))
            if isinstance(module, PackedLayer):
                part = parts[name]
                if part.key not in matrices:
                    matrices[part.key] = self._read(part, arena)
                module.matrix, module.device_mesh = matrices[part.key], mesh
                if isinstance(module, PackedEmbedding):
                    module.own = part.rows
            if name in told_by and isinstance(module, ToldBySamples):
                module.samples = self._digests(name, module, styles, tied, mesh)
            for key, weight in list(module.named_parameters(recurse=False)):
                if weight.is_meta and (source := self._source(f"{name}.{key}", tied)) is not None:
                    module.register_parameter(key, self._values(source, weight))

    def _part(
        self, name: str, layer: PackedLayer, styles: Mapping[str, str], tied: Mapping[str, str], mesh: Any
    ) -> Part:
        """The part of a layer's matrix that this rank holds; InvalidInputError if it cuts groups."""
        source, shape = self._source(f"{name}.weight", tied), _shape(layer)
        assert source is not None
        form = self._kept.format(source)
        assert form is not None
        rows, columns = _own(shape, styles.get(name, WHOLE), mesh)
        check_columns(name, form, columns, shape[1], 1 if mesh is None else mesh.size())
        return Part(source, form, rows, columns)

    def _read(self, part: Part, arena: Arena) -> PackedMatrix:
        """A part of a matrix, read some rows at a time."""
        source, form, own_rows, columns = part
        if self._in_place is not None and (matrix := self._in_place.matrix(source, own_rows, columns)) is not None:
            return matrix
        matrix = None
        for rows in rows_at_a_time(own_rows, columns.stop - columns.start):
            codes = self._kept.codes(source, rows, columns)
            if matrix is None:
                scale = float(codes.scales) if form.is_ternary else 1.0
                in_bf16 = codes.scales.dtype == torch.bfloat16
                matrix = PackedMatrix.empty(form, part.shape, bf16_scales=in_bf16, scale=scale, arena=arena)
            matrix.fill(rows.start - own_rows.start, codes)
        assert matrix is not None
        return matrix

    def _digests(
        self, name: str, module: ToldBySamples, styles: Mapping[str, str], tied: Mapping[str, str], mesh: Any
    ) -> dict[int, str]:
        """By place of those samples that this rank holds: of a linear layer columns, of an embedding rows."""
        layers = _sampled_layers(name, module)
        rows, columns = _own(_shape(module), styles.get(layers[0], WHOLE), mesh)
        axis, own = (0, rows) if isinstance(module, PackedEmbedding) else (1, columns)
        places = sample_places(_shape(module)[axis])
        held = {place: layer for place, layer in zip(places, layers, strict=True) if own.start <= place < own.stop}
        if self._kernels is not None:
            kept = dict(zip(places, self._kernels.digests.get(f"{layers[0]}.weight", ()), strict=False))
            return {place: kept[place] for place in held if place in kept}
        found = {}
        for place, layer in held.items():
            source, sample = self._source(f"{layer}.weight", tied), slice(place, place + 1)
            assert source is not None
            part = (sample, columns) if axis == 0 else (rows, sample)
            found[place] = digest(self._kept.sample(source, *part))
        return found

    def _values(self, source: str, weight: nn.Parameter) -> nn.Parameter:
        """A parameter that is kept in values, or this rank's part of it."""
        own = [own_chunk(weight.data, axis) for axis in range(weight.ndim)]
        rows, columns = (own[0], own[-1]) if weight.ndim > 1 else (own[0], slice(None))
        one_by_one = source.rpartition(".")[2] in EXPERT_WEIGHTS and self._in_place is None  # else views of the file
        each = [slice(row, row + 1) for row in range(rows.start, rows.stop)] if one_by_one else [rows]
        values = _joined([self._checkpoint.values(source, part, columns).to(weight.dtype) for part in each])
        for axis in range(1, weight.ndim - 1):
            values = _joined([values.narrow(axis, *run) for run in own_runs(weight.data, axis)], axis)
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


def _joined(parts: list[Tensor], axis: int = 0) -> Tensor:
    """Several side by side; one alone where it is, which may be a file."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _shape(module: ToldBySamples) -> tuple[int, int]:
    """That of the matrix; of experts that of the layers whose outputs are summed."""
    if isinstance(module, PackedExperts):
        return _shape(next(module.experts).down_proj)
    if isinstance(module, PackedLinear):
        return module.out_features, module.in_features
    return module.num_embeddings, module.embedding_dim


def _columns(module: nn.Module) -> list[int]:
    """The numbers of columns of a linear layer, or of experts, in values."""
    if is_experts(module):
        return [getattr(module, weight).shape[-1] for weight in EXPERT_WEIGHTS]
    return [module.in_features] if isinstance(module, nn.Linear) else []


def _sampled_layers(name: str, module: ToldBySamples) -> list[str]:
    """The layer of each sample by which a model is told from others: of experts one after another."""
    layers = layer_names(name, "down_proj", module.num_experts) if isinstance(module, PackedExperts) else [name]
    return [layers[sample % len(layers)] for sample in range(NUM_SAMPLES)]


def _own(shape: tuple[int, int], style: str, mesh: Any) -> tuple[slice, slice]:
    """The rows and columns that this rank holds."""
    whole = tuple(slice(0, size) for size in shape)
    if mesh is None or style == WHOLE:
        return cast(tuple[slice, slice], whole)
    own = [chunk(size, mesh.get_local_rank(), mesh.size()) for size in shape]
    return (own[0], whole[1]) if style == SPLIT_ROWS else (whole[0], own[1])
