"""The settings of the plug-in, from the environment or from vLLM's `additional_config`: nothing else is read there."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from narrowcast.codecs import Codec, recipe
from narrowcast.codecs.dynamic import DynamicCodec
from narrowcast.errors import InvalidInputError
from narrowcast.plan import Plan
from narrowcast.runtime.sampling import EVERY

KEY = "narrowcast"  # in additional_config
LOGGER = "vllm.narrowcast"  # vLLM shows what its own loggers say
PLAN, CODEC, TUNE, CALIBRATE = "NARROWCAST_PLAN", "NARROWCAST_CODEC", "NARROWCAST_TUNE", "NARROWCAST_CALIBRATE"
TOKENS = f"{CALIBRATE}_TOKENS"
SAMPLE, PORT = "NARROWCAST_SAMPLE_EVERY", "NARROWCAST_METRICS_PORT"
VARIABLES = {
    **{"plan": PLAN, "codec": CODEC, "tune": TUNE, "calibrate": CALIBRATE, "calibrate_tokens": TOKENS},
    **{"sample_every": SAMPLE, "metrics_port": PORT},
}
# Forms of settings, and what may be said beside each.
BESIDE = {
    "plan": {"tune", "sample_every", "metrics_port"},
    "calibrate": {"codec", "calibrate_tokens", "metrics_port"},  # whose sums are exact
    "codec": {"sample_every", "metrics_port"},
}
NUM_TOKENS, CALIBRATED = 4096, "allocated(bits=4)"  # to calibrate on, and the codec
# What numbers say, which ones may be, and a usual one.
NUMBERS = {
    "calibrate_tokens": ("a number of tokens", range(1, sys.maxsize), NUM_TOKENS),
    "sample_every": ("calls of a site, of which one is sampled, or 0 for none", range(sys.maxsize), EVERY),
    "metrics_port": ("a port from 1 to 65000", range(1, 65001), 9464),
}
SWITCH = {"1": True, "True": True, "0": False, "False": False}  # as the environment or JSON has it
REMEDY = f"Set {PLAN} to a plan, or {CODEC} to a codec, or one of them in --additional-config."


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """Writing a plan of `codec` to `path` once `num_tokens` have been seen."""

    path: Path
    codec: str
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.codec} on {self.num_tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A plan, or a `codec` for every row-parallel sum, or a plan to be made, by the `name` that was asked for.

    `tune`: measure at the start which of the plan's sums are worth coding here. `sample_every`: one of so many calls of
    a site is sampled, none for 0. `port`: where the first rank of a machine tells its figures, the next one further.
    """

    name: str
    plan: Plan | None = None
    codec: Codec | None = None
    tune: bool = False
    calibrating: Calibrating | None = None
    sample_every: int = EVERY
    port: int | None = None

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
        name, port = given[form], _number("metrics_port", given) if "metrics_port" in given else None
        if form == "calibrate":
            path, num_tokens = Path(name).absolute(), _number("calibrate_tokens", given, default=NUM_TOKENS)
            calibrating = Calibrating(path=path, codec=given.get("codec", CALIBRATED), num_tokens=num_tokens)
            return cls(name=name, calibrating=calibrating, sample_every=0, port=port)
        sample_every = _number("sample_every", given, default=EVERY)
        if form == "codec":
            return cls(name=name, codec=_codec(name), sample_every=sample_every, port=port)
        tune = _switch("tune", given.get("tune", "0"))
        return cls(name=name, plan=Plan.load(name), tune=tune, sample_every=sample_every, port=port)

    @property
    def fingerprint(self) -> str:
        """Equal for equal settings: of the plan's contents, wherever it lies."""
        return self.plan.fingerprint if self.plan else f"codec {self.codec}, calibrating {self.calibrating}"


def misspelt(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Those of environment variables that are nearly one of ours, and that one."""
    for name in names:
        if name.startswith("NARROWCAST_") and name not in VARIABLES.values():
            yield from ((name, known) for known in get_close_matches(name, VARIABLES.values(), n=1, cutoff=0.9))


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


def _number(form: str, given: Mapping[str, str], default: int | None = None) -> int:
    value, (expected, allowed, usual) = given.get(form, str(default)), NUMBERS[form]
    if not (value.isascii() and value.isdigit() and int(value) in allowed):
        raise InvalidInputError(VARIABLES[form], expected=expected, found=value, remedy=f"Set it to {usual}, say.")
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
