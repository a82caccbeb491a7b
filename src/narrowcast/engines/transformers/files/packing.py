"""Models written in the layout of the kernels: `load` maps them, and whoever else reads safetensors refuses them."""

import shutil
from pathlib import Path

from narrowcast.engines.base import Weights
from narrowcast.engines.transformers.files.loading import config_of, folder_of, packed_model, told
from narrowcast.errors import InvalidInputError
from narrowcast.weights.folders.kernels import METHOD, VERSION
from narrowcast.weights.folders.tensors import SINGLE

GENERATION = "generation_config.json"


def pack(path: str | Path, folder: str | Path, *, weights: Weights = "stored") -> None:
    """Write the model of `path` into a folder that is there: its config, and weights in few bits.

    `weights`: as of `load`; some rows at a time are read and written. InvalidInputError as of `load`, and for weights
    of which none would be in few bits.
    """
    with told(path):
        model, config = packed_model(path, weights), config_of(path)
    if model is None or weights == "dense":
        raise InvalidInputError(
            f"model {path}",
            expected="weights in few bits",
            found="all as values",
            remedy="Pass --weights int4-group32, say.",
        )
    model.write(config, Path(folder) / SINGLE)
    config.quantization_config = {"quant_method": METHOD, "version": VERSION}
    config.save_pretrained(folder)
    source = folder_of(path)
    if source.is_dir() and (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, Path(folder) / GENERATION)
