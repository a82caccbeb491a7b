"""The settings of the plug-in, from the environment or from vLLM's `additional_config`: nothing else is read there."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from narrowcast.codecs import Codec, recipe
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan

KEY = "narrowcast"  # in additional_config
LOGGER = "vllm.narrowcast"  # vLLM shows what its own loggers say
PLAN, CODEC = "NARROWCAST_PLAN", "NARROWCAST_CODEC"
REMEDY = f"Set {PLAN} to a plan, or {CODEC} to a codec, or one of them in --additional-config."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A plan, or a `codec` for every row-parallel sum, by the `name` that was asked for."""

    name: str
    plan: Plan | None = None
    codec: Codec | None = None

    @classmethod
    def of(cls, additional_config: Any) -> Self | None:
        """The settings; None where nothing is asked for. Raises as `Plan.load` does, and InvalidInputError."""
        asked = [(form, value) for form, value in _asked(additional_config) if value]
        if not asked:
            return None
        if len(asked) > 1:
            raise InvalidInputError(
                "narrowcast",
                expected="one plan or one codec",
                found=" and ".join(f"{form} {value}" for form, value in asked),
                remedy=REMEDY,
            )
        ((form, value),) = asked
        if form == "plan":
            return cls(name=value, plan=Plan.load(value))
        return cls(name=value, codec=_codec(value))

    @property
    def fingerprint(self) -> str:
        """Equal for equal settings: of the plan's contents, wherever it lies."""
        return self.plan.fingerprint if self.plan else f"codec {self.codec}"


def _asked(additional_config: Any) -> list[tuple[str, str]]:
    """Forms and values, "" for what is not asked for."""
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping) or not given.keys() <= {"plan", "codec"}:
        raise InvalidInputError(
            f"additional_config, {KEY}",
            expected='{"plan": PATH} or {"codec": NAME}',
            found=repr(given),
            remedy=REMEDY,
        )
    environment = ("plan", os.environ.get(PLAN, "")), ("codec", os.environ.get(CODEC, ""))
    return [*((form, str(value)) for form, value in given.items()), *environment]


def _codec(name: str) -> Codec:
    """The codec of that name; InvalidInputError for one whose tensors come of a calibration."""
    asked = recipe(name)
    if not isinstance(asked, DynamicCodec):
        raise InvalidInputError(
            f"codec {name}",
            expected="one that needs no calibration, such as int8-group128",
            found="one that does",
            remedy=f"Calibrate a plan with it, and set {PLAN}.",
        )
    return asked
