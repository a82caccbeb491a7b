"""Calibration: a model and text in, a plan out."""

from narrowcast.calibration.build import Observations
from narrowcast.calibration.calibration import DEFAULT_FIRST_TOKENS, DEFAULT_NUM_FIRST, calibrate, observe
from narrowcast.calibration.fit import ModelRecipe
from narrowcast.calibration.recipes import CodecByKind, asked_for, by_kind, moments_needed, recipes_by_kind

__all__ = [
    "DEFAULT_FIRST_TOKENS",
    "DEFAULT_NUM_FIRST",
    "CodecByKind",
    "ModelRecipe",
    "Observations",
    "asked_for",
    "by_kind",
    "calibrate",
    "moments_needed",
    "observe",
    "recipes_by_kind",
]
