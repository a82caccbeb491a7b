"""The tensors of a folder: one safetensors file, or several with an index. Mapped: only what is asked for is read."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from narrowcast.weights.checkpoint import ALL
from narrowcast.weights.parts import span
from narrowcast.weights.refusals import broken, unserved

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_NBYTES_OF_JSON = 1 << 28


class Tensors:
    """Tensors by name. InvalidInputError for a folder without them, and for files that are missing or broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._slices: dict[str, Any] = {}
        if (folder / SINGLE).is_file():
            self._slices = _opened(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._slices = _sharded(folder, read_json(folder / INDEX).get("weight_map"))
        else:
            others = sorted(
                path.name for pattern in ("*.safetensors", "*.bin", "*.pt*") for path in folder.glob(pattern)
            )
            raise unserved(
                folder, f"{SINGLE} or {INDEX}", others[0] if others else "neither", "Save the model as safetensors."
            )

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._slices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors names it: BF16, I32."""
        return str(self._slices[name].get_dtype())

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A part of a tensor, in memory of its own: rows of the first dimension, columns of the last one."""
        shape = self.shape(name)
        parts = [slice(*span(rows, shape[0]))] if shape else []
        if len(shape) > 1:
            parts += [ALL] * (len(shape) - 2) + [slice(*span(columns, shape[-1]))]
        found: Tensor = self._slices[name][tuple(parts) or ...]
        return found.clone(memory_format=torch.contiguous_format)


def _sharded(folder: Path, files_of: object) -> dict[str, Any]:
    """The slices of the tensors in an index, each in its file."""
    index = folder / INDEX
    if not isinstance(files_of, dict) or not all(isinstance(file, str) for file in files_of.values()):
        raise broken(index, "weight_map, file names by tensors", type(files_of).__name__)
    opened: dict[str, Mapping[str, Any]] = {}
    for name, file in files_of.items():
        if Path(file).name != file:
            raise broken(index, "names of files beside it", repr(file))
        if file not in opened:
            opened[file] = _opened(folder / file)
        if name not in opened[file]:
            raise broken(folder / file, f"{name}, as the index has it", "a file without it")
    return {name: opened[file][name] for name, file in files_of.items()}


def _opened(path: Path) -> dict[str, Any]:
    """The slices of the tensors in a file."""
    try:
        file: Any = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise broken(path, "a safetensors file", str(error)) from error
    except OSError as error:
        raise broken(path, "a file that can be read", (error.strerror or str(error)).lower()) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; InvalidInputError if there is none."""
    try:
        if (size := path.stat().st_size) > MAX_NBYTES_OF_JSON:
            raise broken(path, "JSON of a model", f"{size} bytes")
        found = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise broken(path, "a file that can be read", (error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        raise broken(path, "JSON", "something else") from error
    if not isinstance(found, dict):
        raise broken(path, "a JSON object", f"a {type(found).__name__}")
    return found
