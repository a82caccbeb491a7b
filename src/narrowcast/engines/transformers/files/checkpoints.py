"""The front door to weights at rest: a folder of safetensors or a GGUF file."""

from pathlib import Path

from narrowcast.engines.transformers.files.gguf_model import GgufModel
from narrowcast.errors import InvalidInputError
from narrowcast.weights.checkpoint import Checkpoint
from narrowcast.weights.folders import open_folder


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The parameters of the model at `path`, by Transformers' names; nothing but headers is read.

    InvalidInputError for a path without a model, for broken files, and for weights that nothing here reads: of GGUF
    files `gguf_model.knows` tells beforehand.
    """
    place = Path(path)
    if place.is_file():
        return GgufModel(place)
    if place.is_dir():
        return open_folder(place)
    raise InvalidInputError(
        f"model {path}", expected="a folder or a GGUF file", found="neither", remedy="Check the path."
    )
