"""Transformers as an engine: its run-time seam, and its model files."""

from narrowcast.engines.transformers.files import (
    fingerprint,
    load,
    load_tokenizer,
    num_features,
    rotate,
    save,
    skeleton,
)
from narrowcast.engines.transformers.seam import computing_shares, groups, sites, split_of, take_over

__all__ = [
    "computing_shares",
    "fingerprint",
    "groups",
    "load",
    "load_tokenizer",
    "num_features",
    "rotate",
    "save",
    "sites",
    "skeleton",
    "split_of",
    "take_over",
]
