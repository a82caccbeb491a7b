"""The form of a plan's header: every field is checked when a file is read, before anything is made of it.

The hash of a plan finds accidents; whoever can write a file can hash it again, by mistake or not. A check takes a JSON
value and where it stands, and raises ValueError with both.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from narrowcast.codecs import CODECS
from narrowcast.plan.split import KINDS, MAX_RANKS, SUMS, Experts

Check = Callable[[Any, str], None]

MAX_INTEGER = 1 << 62


def _refuse(where: str, expected: str, found: object) -> ValueError:
    return ValueError(f"{where or 'it'}: expected {expected}, found {str(found)[:40]!r}")


def _integer(least: int = 0, most: int = MAX_INTEGER) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _refuse(where, f"an integer from {least} to {most}", value)

    return check


def _number(value: Any, where: str) -> None:
    if type(value) not in (int, float) or not 0 <= value <= MAX_INTEGER:
        raise _refuse(where, "a finite number of 0 or more", value)


def _finite(value: Any, where: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _refuse(where, "a finite number", value)


def _text(value: Any, where: str) -> None:
    if type(value) is not str:
        raise _refuse(where, "text", value)


def _any(value: Any, where: str) -> None:
    """Whatever JSON can say."""


def _one_of(names: Sequence[str]) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not str or value not in names:
            raise _refuse(where, f"one of {', '.join(names)}", value)

    return check


def _none_or(checked: Check) -> Check:
    return lambda value, where: None if value is None else checked(value, where)


def _list_of(each: Check, least: int = 0, most: int = MAX_INTEGER) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not list or not least <= len(value) <= most:
            raise _refuse(where, f"a list of {least} items or more", value)
        for place, item in enumerate(value):
            each(item, f"{where}[{place}]")

    return check


def _tuple_of(*parts: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not list or len(value) != len(parts):
            raise _refuse(where, f"a list of {len(parts)} items", value)
        for part, item in zip(parts, value, strict=True):
            part(item, where)

    return check


def _mapping_of(each: Check, key: Check = _text) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            raise _refuse(where, "an object", value)
        for name, item in value.items():
            key(name, f"{where}, a name")
            each(item, f"{where}.{name}" if where else name)

    return check


def _record(**fields: Check) -> Check:
    """An object of these fields, and no other."""

    def check(value: Any, where: str) -> None:
        if type(value) is not dict or value.keys() != fields.keys():
            raise _refuse(where, f"the fields {', '.join(fields)}", list(value) if type(value) is dict else value)
        for name, field in fields.items():
            field(value[name], f"{where}.{name}" if where else name)

    return check


def _digits(value: Any, where: str) -> None:
    if not (value.isascii() and value.isdigit() and 0 < len(value) < 10):
        raise _refuse(where, "a number of features", value)


def _ascending(of: Check) -> Check:
    """Pairs [tokens, of], of which the first says from how many tokens on."""
    pairs = _list_of(_tuple_of(_integer(1), of), least=1)

    def check(value: Any, where: str) -> None:
        pairs(value, where)
        if any(after[0] <= before[0] for before, after in itertools.pairwise(value)):
            raise _refuse(where, "ascending numbers of tokens", value)

    return check


def _config(value: Any, where: str) -> None:
    """Of the model; what is computed with has a size."""
    _mapping_of(_any)(value, where)
    for name in {"hidden_size", "vocab_size"} & value.keys():
        _integer(1)(value[name], f"{where}.{name}")


_HOP = _record(codec=_one_of(list(CODECS)), config=_mapping_of(_any), tensors=_list_of(_text))
_SITE = _record(kind=_one_of(KINDS), stages=_list_of(_HOP, 1, 3), error=_mapping_of(_number))
_HEADER = _record(
    format_version=_integer(),
    split=_record(tp_size=_integer(1, MAX_RANKS), pp_size=_integer(1, MAX_RANKS), experts=_one_of(get_args(Experts))),
    groups=_list_of(_list_of(_integer(0, MAX_RANKS), least=1)),
    model=_record(config=_config, samples=_mapping_of(_list_of(_none_or(_text)))),
    calibration=_mapping_of(_any),
    sites=_mapping_of(_SITE),
    decisions=_record(
        coded=_mapping_of(_ascending(_text), _digits),
        plain=_mapping_of(_ascending(_text), _digits),
        transport=_text,
        waits=_mapping_of(_ascending(_number), _digits),
        weights_gbps=_number,
        logits_s=_number,
    ),
    feedback=_record(
        chains=_list_of(_list_of(_text)),
        refused=_mapping_of(_text),
        readers=_mapping_of(_record(after=_text, modules=_list_of(_text), scale=_finite)),
        unread=_text,
    ),
)


def check_header(header: Mapping[str, Any]) -> None:
    """ValueError, naming the field, unless each has the form that a plan's has, and they agree with each other."""
    _HEADER(header, "")
    ranks, groups, sites = range(header["split"]["tp_size"]), header["groups"], header["sites"]
    if groups and sorted(itertools.chain(*groups)) != list(ranks):
        raise _refuse("groups", f"each rank below {len(ranks)} in one of them", groups)
    for name, site in sites.items():
        num_hops = 2 + bool(groups) if site["kind"] in SUMS else 1
        if len(site["stages"]) != num_hops:
            raise _refuse(f"sites.{name}.stages", f"{num_hops}", len(site["stages"]))
    decisions, feedback = header["decisions"], header["feedback"]
    if decisions["waits"] and not decisions["weights_gbps"]:
        raise _refuse("decisions.weights_gbps", "more than 0, beside waits", 0)
    sums = {name for name, site in sites.items() if site["kind"] in SUMS}
    chained = {site for chain in feedback["chains"] for site in chain}
    if not chained <= sums and header["split"]["pp_size"] == 1:  # a stage's part of a plan has all chains
        raise _refuse("feedback.chains", "sums of the plan", sorted(chained - sums)[0])
    for norm, reader in feedback["readers"].items():
        if reader["after"] not in chained:
            raise _refuse(f"feedback.readers.{norm}.after", "a site of a chain", reader["after"])
