"""The matrices of a model by its config, and by headers of its files: shapes and formats, and not a value."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from narrowcast.engines.base import Matrix, Weights
from narrowcast.engines.transformers.files.checkpoints import open_checkpoint
from narrowcast.engines.transformers.files.experts import shapes_by_expert
from narrowcast.engines.transformers.files.loading import GGUF, reads_itself, skeleton
from narrowcast.engines.transformers.files.packed import PackedModel
from narrowcast.engines.transformers.seam import SPLIT_COLUMNS, SPLIT_ROWS, styles_of
from narrowcast.engines.transformers.sharding import EXPERT_WEIGHTS, is_experts
from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.experts import layer_names
from narrowcast.weights.folders import served_method
from narrowcast.weights.formats import GroupedCodes, WeightFormat, w4a16

USUAL = w4a16(128)  # of AWQ, GPTQ and W4A16, whose files are elsewhere


class Unread:
    """A `Checkpoint` of which the config alone is there: its shapes; layers in the usual format if `in_few_bits`."""

    notes: Sequence[str] = ()

    def __init__(self, model: nn.Module, *, in_few_bits: bool) -> None:
        self._shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        vocabulary = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
        layers = {name: module for name, module in model.named_modules() if module not in vocabulary}
        linear = {f"{name}.weight" for name, module in layers.items() if isinstance(module, nn.Linear)}
        for name, module in layers.items():
            if is_experts(module):
                matrices = shapes_by_expert(name, module)
                linear |= matrices.keys()
                self._shapes |= matrices
        self._packed = linear if in_few_bits else set()

    @property
    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def format(self, name: str) -> WeightFormat | None:
        return USUAL if name in self._packed and self.shape(name)[1] % USUAL.group_size == 0 else None

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        raise NotImplementedError("nothing is read")

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        raise NotImplementedError("nothing is read")


def matrices(path: str | Path, *, weights: Weights = "stored") -> Sequence[Matrix]:
    """Those of the causal LM at `path`, in the order of its layers; InvalidInputError where `load` has one."""
    model = skeleton(path)
    formats: dict[str, WeightFormat] = {}
    ours = reads_itself(path, weights)
    if ours or Path(path).suffix == GGUF:
        model.bfloat16()  # which values become, unless `load` is asked for others
    if ours:
        here = Path(path).is_file() or any(Path(path).glob("*.safetensors"))
        packed = PackedModel(path, open_checkpoint(path) if here else _unread(path, model), weights)
        formats = packed.formats(model)
    return list(_matrices(model, formats))


def _unread(path: str | Path, model: nn.Module) -> Unread:
    quantization = getattr(cast(Any, model).config, "quantization_config", None)
    if quantization is not None:
        served_method(Path(path), quantization)
    return Unread(model, in_few_bits=quantization is not None)


def _matrices(model: nn.Module, formats: dict[str, WeightFormat]) -> Iterator[Matrix]:
    module: Any
    styles, output = styles_of(model), cast(Any, model).get_output_embeddings()
    for name, module in model.named_modules():
        is_shared = styles.get(name) in (SPLIT_ROWS, SPLIT_COLUMNS)
        if is_experts(module):
            used = int(cast(Any, model).config.get_text_config().num_experts_per_tok)
            for weight in EXPERT_WEIGHTS:
                number, *shape = getattr(module, weight).shape
                (first, *_) = layer_names(name, weight, number)
                form = formats.get(first, getattr(module, weight).dtype)
                yield Matrix(shape=tuple(shape), format=form, is_shared=True, number=number, used=used)
        elif isinstance(module, nn.Embedding | nn.Linear):
            if isinstance(module, nn.Embedding) and output is not None and module.weight is output.weight:
                continue  # counted as the output layer
            num_rows, num_columns = module.weight.shape
            yield Matrix(
                shape=(num_rows, num_columns),
                format=formats.get(name, module.weight.dtype),
                is_shared=is_shared,
                used=int(isinstance(module, nn.Linear)),
                of_last=module is output,
            )
