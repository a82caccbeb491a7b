"""Recipes as text: `group(bits=5, size=64)` is a dataclass with its fields, read from text and written as such.

A parameter's name, type and default are those of the field, and stand nowhere else.
"""

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from narrowcast.errors import InvalidInputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Spelt:
    """A frozen dataclass that text can stand for; `str` gives that text, or the name of the preset that it equals."""

    id: ClassVar[str]

    def __str__(self) -> str:
        from narrowcast.codecs.presets import PRESETS  # here, as presets are made of subclasses of this one

        presets: dict[str, object] = dict(PRESETS)
        return next((name for name, preset in presets.items() if preset == self), spelt_out(self))


SpeltType = TypeVar("SpeltType", bound=Spelt)


def key(name: str) -> dict[str, str]:
    """Metadata of a field whose parameter has another name than the field."""
    return {"key": name}


def parameters(kind: type[Spelt]) -> dict[str, Field[Any]]:
    """Its fields by the names of parameters, those that it inherits last."""
    own = inspect.get_annotations(kind)
    ordered = sorted(fields(kind), key=lambda field: field.name not in own)  # type: ignore[arg-type]
    return {field.metadata.get("key", field.name): field for field in ordered}


def spelt_out(recipe: Spelt) -> str:
    """Its name and the parameters that are not at their defaults: `feature(bits=3)`."""
    values = {name: (getattr(recipe, field.name), field.default) for name, field in parameters(type(recipe)).items()}
    told = ", ".join(f"{name}={_written(value)}" for name, (value, default) in values.items() if value != default)
    return f"{recipe.id}({told})"


def read(kind: type[SpeltType], text: str, arguments: str) -> SpeltType:
    """The recipe with these `arguments`, the part of `text` between the parentheses; InvalidInputError if it is none.

    >>> from narrowcast.codecs import GroupCodec
    >>> read(GroupCodec, "group(bits=5, size=64)", "bits=5, size=64")
    GroupCodec(num_bits=5, group_size=64, symmetric=False, spikes=False)
    """
    known, hints = parameters(kind), get_type_hints(kind)
    given: dict[str, Any] = {}
    for part in filter(None, (each.strip() for each in arguments.split(","))):
        name, _, value = (each.strip() for each in part.partition("="))
        if name not in known or known[name].name in given:
            raise InvalidInputError(
                f"codec {text}",
                expected=f"parameters of {kind.id}, each once: {', '.join(known)}",
                found=part,
                remedy=nearest(name, known) or "Leave it out.",
            )
        given[known[name].name] = _value(hints[known[name].name], value, f"{name} of codec {text}")
    if missing := [name for name, each in known.items() if each.default is MISSING and each.name not in given]:
        raise InvalidInputError(
            f"codec {text}", expected=f"{' and '.join(missing)} too", found=arguments or "nothing", remedy="Add it."
        )
    return kind(**given)


def split(text: str) -> tuple[str, str | None]:
    """Name and arguments of a spelling, None for a name alone; InvalidInputError for other text."""
    found = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise InvalidInputError(
            "codec",
            expected="a name, or a name with parameters such as group(bits=5, size=64)",
            found=text,
            remedy="See `narrowcast codecs`.",
        )
    return found[1], found[2]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A sentence with the names that look most like it, if any do."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"Did you mean {' or '.join(close)}?" if close else None


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, torch.dtype):
        return next(name for name, dtype in DTYPES.items() if dtype == value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _value(hint: Any, text: str, subject: str) -> Any:
    """The value of a parameter of type `hint`."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    choices = _choices(hint)
    try:
        if choices is not None:
            return choices[text]
        return hint(text)
    except (KeyError, ValueError):
        kinds = {int: "a whole number", float: "a number"}
        expected = f"one of {', '.join(choices)}" if choices is not None else kinds[hint]
        remedy = nearest(text, choices or ()) or "Choose another."
        raise InvalidInputError(subject, expected=expected, found=text or "nothing", remedy=remedy) from None


def _choices(hint: Any) -> dict[str, Any] | None:
    """The values of a type that has few, by what is written for them."""
    if get_origin(hint) is Literal:
        return {each: each for each in get_args(hint)}
    if hint is bool:
        return {"true": True, "false": False}
    return dict(DTYPES) if hint is torch.dtype else None
