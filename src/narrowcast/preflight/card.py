"""A rank's words about itself: its host, its software, the plan and the model that it finds."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from narrowcast.codecs import kernels
from narrowcast.engines import load_engine
from narrowcast.errors import NarrowcastError
from narrowcast.files import versions
from narrowcast.launch.process import share_of_cores
from narrowcast.plan import Plan
from narrowcast.preflight.roll import loopback_of
from narrowcast.transport.address import Card as Way
from narrowcast.transport.address import Host
from narrowcast.transport.tcp import COMPILED

S = TypeVar("S")
T = TypeVar("T")

COMPARED = "narrowcast", "torch", "transformers", "python"


@dataclass(frozen=True, kw_only=True)
class Card:
    """Words of a rank about itself, before it knows of others.

    `way`: the network that it would take. `looping`: loopback addresses by the names of hosts that lead to them here.
    `plan`, `model`: its fingerprint, fields of its config; None for those that were not asked for, or are refused.
    """

    host: str
    machine: str
    way: Way
    versions: dict[str, str | None]
    compiled: bool
    kernels: str
    cores: int
    threads: int
    looping: dict[str, str]
    plan: str | None = None
    model: dict[str, Any] | None = None
    refusals: list[str] = field(default_factory=list)

    @classmethod
    def this(cls, hosts: Sequence[str], plan: Path | None, model: str | None) -> Self:
        """The card of this rank. `hosts`: names of those of all ranks, where they are known."""
        name, found = socket.gethostname(), versions()
        names = {name, os.environ["MASTER_ADDR"], *hosts}
        refusals: list[str] = []
        return cls(
            host=name,
            machine=Host.this().machine,
            way=Way.this(),
            versions={package: found[package] for package in COMPARED},
            compiled=COMPILED,
            kernels=kernels.selected(),
            cores=os.cpu_count() or 1,
            threads=share_of_cores(),
            looping={each: address for each in sorted(names) if (address := loopback_of(each))},
            plan=_found(plan, lambda path: Plan.load(path).fingerprint, refusals),
            model=_found(model, _config_fields, refusals),
            refusals=refusals,
        )

    @classmethod
    def of(cls, said: dict[str, Any]) -> Self:
        """The card that `to_json` told."""
        return cls(**{**said, "way": Way(**said["way"])})

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values."""
        return asdict(self)


def _config_fields(model: str) -> dict[str, Any]:
    engine = load_engine()
    return dict(engine.fingerprint(engine.skeleton(model)).config)


def _found(asked: S | None, find: Callable[[S], T], refusals: list[str]) -> T | None:
    """The result of `find` for what was asked for; None, with another of the `refusals`, where that cannot be used."""
    try:
        return None if asked is None else find(asked)
    except NarrowcastError as error:
        refusals.append(str(error))
        return None
