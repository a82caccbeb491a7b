"""Model files of Transformers: loading, saving, telling models apart, other axes."""

from typing import Any, cast

from torch import Tensor, nn

from narrowcast.engines.transformers.files import rotation
from narrowcast.engines.transformers.files.fingerprint import fingerprint
from narrowcast.engines.transformers.files.loading import load, load_tokenizer, obstacle, save, skeleton
from narrowcast.engines.transformers.files.matrices import matrices
from narrowcast.engines.transformers.files.packing import pack
from narrowcast.engines.transformers.files.vocabulary import vocabulary
from narrowcast.engines.transformers.seam import summed
from narrowcast.engines.transformers.sharding import check_dense
from narrowcast.errors import InvalidInputError


def num_features(model: nn.Module) -> int:
    """The width of the embedding."""
    return int(cast(Any, model).get_input_embeddings().embedding_dim)


def rotate(model: nn.Module, rotation_EE: Tensor) -> None:
    """Fold `rotation_EE` into what reads and writes the residual stream."""
    check_dense("model to rotate", model)
    if rotation_EE.shape[0] != num_features(model):
        raise InvalidInputError(
            "rotation",
            expected=f"the model's {num_features(model)} features",
            found=rotation_EE.shape[0],
            remedy="Make one for this model.",
        )
    rotation.rotate(model, summed(model), rotation_EE)


__all__ = [
    "fingerprint",
    "load",
    "load_tokenizer",
    "matrices",
    "num_features",
    "obstacle",
    "pack",
    "rotate",
    "save",
    "skeleton",
    "vocabulary",
]
