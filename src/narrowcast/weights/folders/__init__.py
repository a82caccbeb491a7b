"""Folders of safetensors: parameters as they are, and linear layers that a quantizer has packed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from narrowcast.weights.checkpoint import ALL, Checkpoint
from narrowcast.weights.experts import JOINED, layer_names
from narrowcast.weights.folders.awq import awq
from narrowcast.weights.folders.compressed_tensors import compressed_tensors
from narrowcast.weights.folders.gptq import gptq
from narrowcast.weights.folders.kernels import METHOD, PLAIN, KernelsFolder
from narrowcast.weights.folders.packed import PackedWeight
from narrowcast.weights.folders.tensors import Tensors, read_json
from narrowcast.weights.formats import GroupedCodes, WeightFormat
from narrowcast.weights.refusals import unserved

CONFIG = "config.json"

QUANTIZERS: Mapping[str, Callable[[Tensors, Mapping[str, Any]], Mapping[str, PackedWeight]]] = {
    "awq": awq,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
}


class Folder:
    """A `Checkpoint` of a folder. `packed`: parameters that are given in codes, by name; all others are plain."""

    notes: Sequence[str] = ()

    def __init__(self, tensors: Tensors, packed: Mapping[str, PackedWeight]) -> None:
        self._tensors, self._packed = tensors, packed
        _take_experts_apart(tensors)
        parts = {part for weight in packed.values() for part in weight.parts}
        self.names: Collection[str] = (set(tensors.names) - parts) | packed.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name].shape if name in self._packed else self._tensors.shape(name)

    def format(self, name: str) -> WeightFormat | None:
        return self._packed[name].format if name in self._packed else None

    def codes(self, name: str, rows: slice = ALL, columns: slice = ALL) -> GroupedCodes:
        return self._packed[name].codes(rows, columns)

    def values(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        if name in self._packed:
            return self.codes(name, rows, columns).dequantized()
        if (dtype := self._tensors.dtype(name)) not in PLAIN:
            raise unserved(self._tensors.folder, f"{name} in BF16, FP16 or FP32", dtype, "Use another model.")
        return self._tensors.read(name, rows, columns)


def _take_experts_apart(tensors: Tensors) -> None:
    """Let the plain matrices of experts that are in one tensor have names of their own."""
    for name in list(tensors.names):
        experts, _, weight = name.rpartition(".")
        shape = tensors.shape(name)
        is_joined = experts.endswith("experts") and weight in JOINED and len(shape) == 3
        if is_joined and tensors.dtype(name) in PLAIN and shape[1] % len(JOINED[weight]) == 0:
            tensors.take_apart(name, [f"{layer}.weight" for layer in layer_names(experts, weight, shape[0])])


def open_folder(folder: Path) -> Checkpoint:
    """The checkpoint of a folder. InvalidInputError if it is broken, or quantized in a way that nothing here reads."""
    config = read_json(folder / CONFIG)
    quantization = config.get("quantization_config") or config.get("compression_config")
    tensors = Tensors(folder)
    if quantization is None:
        return Folder(tensors, {})
    method = served_method(folder, quantization)
    return (
        KernelsFolder(tensors, quantization)
        if method == METHOD
        else Folder(tensors, QUANTIZERS[method](tensors, quantization))
    )


def served_method(path: Path, quantization: Any) -> str:
    """The method of a config's `quantization_config`; InvalidInputError for one that nothing here reads."""
    method = str(quantization.get("quant_method") if isinstance(quantization, dict) else quantization)
    if method not in (METHOD, *QUANTIZERS) or not isinstance(quantization, dict):
        raise unserved(
            path,
            f"plain weights, or those of {', '.join(QUANTIZERS)}",
            f"quantization {method}",
            "Use a GGUF file, or the model that it was made of.",
        )
    return method
