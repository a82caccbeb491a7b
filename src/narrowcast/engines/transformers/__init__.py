"""Transformers as an engine: its run-time seam, and its model files."""

from narrowcast.engines.transformers.files import (
    fingerprint,
    load,
    load_tokenizer,
    matrices,
    num_features,
    obstacle,
    pack,
    rotate,
    save,
    skeleton,
    vocabulary,
)
from narrowcast.engines.transformers.paging import pages
from narrowcast.engines.transformers.seam import (
    check_shares,
    computing_shares,
    groups,
    halve_prompts,
    shares_read,
    short_prompt,
    sites,
    split_of,
    take_over,
)

__all__ = [
    "check_shares",
    "computing_shares",
    "fingerprint",
    "groups",
    "halve_prompts",
    "load",
    "load_tokenizer",
    "matrices",
    "num_features",
    "obstacle",
    "pack",
    "pages",
    "rotate",
    "save",
    "shares_read",
    "short_prompt",
    "sites",
    "skeleton",
    "split_of",
    "take_over",
    "vocabulary",
]
