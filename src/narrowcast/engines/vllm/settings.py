"""The settings of the plug-in, from the environment or from vLLM's `additional_config`: nothing else is read there."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from narrowcast.codecs import Codec, recipe
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan

KEY = "narrowcast"  # in additional_config
LOGGER = "vllm.narrowcast"  # vLLM shows what its own loggers say
PLAN, CODEC, TUNE, CALIBRATE = "NARROWCAST_PLAN", "NARROWCAST_CODEC", "NARROWCAST_TUNE", "NARROWCAST_CALIBRATE"
TOKENS = f"{CALIBRATE}_TOKENS"
VARIABLES = {"plan": PLAN, "codec": CODEC, "tune": TUNE, "calibrate": CALIBRATE, "calibrate_tokens": TOKENS}
# Forms of settings, and what may be said beside each.
BESIDE = {"plan": {"tune"}, "calibrate": {"codec", "calibrate_tokens"}, "codec": set[str]()}
NUM_TOKENS = 4096
SWITCH = {"1": True, "True": True, "0": False, "False": False}  # as the environment or JSON has it
REMEDY = f"Set {PLAN} to a plan, or {CODEC} to a codec, or one of them in --additional-config."


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """Writing a plan of `codec`, "" for the usual one, to `path` once `num_tokens` have been seen."""

    path: Path
    codec: str
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.codec or 'the usual codec'} on {self.num_tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A plan, or a `codec` for every row-parallel sum, or a plan to be made, by the `name` that was asked for.

    `tune`: measure at the start which of the plan's sums are worth coding here.
    """

    name: str
    plan: Plan | None = None
    codec: Codec | None = None
    tune: bool = False
    calibrating: Calibrating | None = None

    @classmethod
    def of(cls, additional_config: Any) -> Self | None:
        """The settings; None where nothing is asked for. Raises as `Plan.load` does, and InvalidInputError."""
        asked = [(form, value) for form, value in _asked(additional_config) if value]
        if not asked:
            return None
        given = dict(asked)
        form = next((form for form in BESIDE if form in given), "")
        if len(given) < len(asked) or not given.keys() <= {form, *BESIDE.get(form, ())}:
            raise InvalidInputError(
                "narrowcast",
                expected="one plan, or one codec, or one plan to be calibrated",
                found=" and ".join(f"{form} {value}" for form, value in asked),
                remedy=REMEDY,
            )
        name = given[form]
        if form == "calibrate":
            num_tokens = _count("calibrate_tokens", given.get("calibrate_tokens", str(NUM_TOKENS)))
            path = Path(name).absolute()
            return cls(
                name=name, calibrating=Calibrating(path=path, codec=given.get("codec", ""), num_tokens=num_tokens)
            )
        if form == "codec":
            return cls(name=name, codec=_codec(name))
        return cls(name=name, plan=Plan.load(name), tune=_switch("tune", given.get("tune", "0")))

    @property
    def fingerprint(self) -> str:
        """Equal for equal settings: of the plan's contents, wherever it lies."""
        return self.plan.fingerprint if self.plan else f"codec {self.codec}, calibrating {self.calibrating}"


def _asked(additional_config: Any) -> list[tuple[str, str]]:
    """Forms and values, "" for what is not asked for."""
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping) or not given.keys() <= VARIABLES.keys():
        raise InvalidInputError(
            f"additional_config, {KEY}",
            expected='{"plan": PATH} or {"codec": NAME}',
            found=repr(given),
            remedy=REMEDY,
        )
    environment = ((form, os.environ.get(variable, "")) for form, variable in VARIABLES.items())
    return [*((form, str(value)) for form, value in given.items()), *environment]


def _switch(form: str, value: str) -> bool:
    if value not in SWITCH:
        raise InvalidInputError(VARIABLES[form], expected="1 or 0", found=value, remedy="Set it to 1, or leave it out.")
    return SWITCH[value]


def _count(form: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise InvalidInputError(
            VARIABLES[form], expected="a number of tokens", found=value, remedy=f"Set it to {NUM_TOKENS}, say."
        )
    return int(value)


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
