"""The calibrated artifact: which codec serves which site of which model, split in which way."""

from narrowcast.plan.fingerprint import ModelFingerprint
from narrowcast.plan.plan import FORMAT_VERSION, Plan, Site

__all__ = ["FORMAT_VERSION", "ModelFingerprint", "Plan", "Site"]
