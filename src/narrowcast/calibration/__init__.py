"""Calibration: a model and text in, a plan out."""

from narrowcast.calibration.build import Observations
from narrowcast.calibration.calibration import DEFAULT_FIRST_TOKENS, DEFAULT_NUM_FIRST, calibrate, observe
from narrowcast.calibration.recipes import (
    DEFAULT_CODEC,
    DEFAULT_TARGET_KL,
    CodecByKind,
    moments_needed,
    recipes_by_kind,
)

__all__ = [
    "DEFAULT_CODEC",
    "DEFAULT_FIRST_TOKENS",
    "DEFAULT_NUM_FIRST",
    "DEFAULT_TARGET_KL",
    "CodecByKind",
    "Observations",
    "calibrate",
    "moments_needed",
    "observe",
    "recipes_by_kind",
]
