"""Depth feedback in a plan: which sites leave what they lose to the next one, who reads it, and why others do not."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TURNED_OFF = "the plan was calibrated without"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A norm that reads the residual stream after the site `after` of a chain, and before the next one.

    `modules`: those that compute each rank's own share of a block from what the norm gives: they may be given what a
    rank knows of the stream and others do not. `scale`: what a sum is multiplied by on its way into the stream.
    """

    after: str
    modules: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Chains:
    """`chains`: sites in the order of execution, each of which leaves what it loses to the next one of its chain.

    A chain ends where the stream goes to another pipeline stage, or out of the model. `refused`: reasons by site why a
    sum is in none. `readers`: by name, the norms through which blocks read the stream in between; `unread`: why ranks'
    blocks do not read it with what their own last payload lost.
    """

    chains: Sequence[tuple[str, ...]] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, Reader] = field(default_factory=dict)
    unread: str = ""

    @property
    def read(self) -> frozenset[str]:
        """The sites whose loss each rank makes good for itself: of R payloads' errors its blocks see R - 1."""
        return frozenset() if self.unread else frozenset(site for chain in self.chains for site in chain[:-1])

    @property
    def following(self) -> dict[str, str]:
        """The site that makes good what a site loses, if there is one."""
        return {site: after for chain in self.chains for site, after in itertools.pairwise(chain)}

    def turned_off(self) -> "Chains":
        """No chains."""
        reasons = {site: TURNED_OFF for chain in self.chains for site in chain}
        return Chains(refused={**self.refused, **reasons}, unread=TURNED_OFF)

    def among(self, sites: Collection[str]) -> "Chains":
        """The same of fewer sites."""
        chains = tuple(tuple(site for site in chain if site in sites) for chain in self.chains)
        return replace(self, chains=chains)

    def joined(self, other: "Chains") -> "Chains":
        """Those of two ranks: of other stages, or the same."""
        new = tuple(chain for chain in other.chains if chain not in self.chains)
        readers = {**self.readers, **other.readers}
        return Chains(
            chains=(*self.chains, *new),
            refused={**self.refused, **other.refused},
            readers=readers,
            unread=self.unread or other.unread,
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        readers = {
            norm: {"after": each.after, "modules": list(each.modules), "scale": each.scale}
            for norm, each in sorted(self.readers.items())
        }
        return {
            "chains": [list(chain) for chain in self.chains],
            "refused": dict(sorted(self.refused.items())),
            "readers": readers,
            "unread": self.unread,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Chains":
        """The chains that `to_json` gave; KeyError, TypeError or ValueError if it gave none such."""
        chains = tuple(tuple(map(str, chain)) for chain in values["chains"])
        if len(set().union(*chains)) < sum(map(len, chains)):
            raise ValueError("a site is in one chain once")
        readers = {
            str(norm): Reader(
                after=str(each["after"]), modules=tuple(map(str, each["modules"])), scale=float(each["scale"])
            )
            for norm, each in values["readers"].items()
        }
        modules = [module for each in readers.values() for module in each.modules]
        if len(set(modules)) < len(modules) or not all(math.isfinite(each.scale) for each in readers.values()):
            raise ValueError("a module has one reader, of a finite scale")
        return cls(
            chains=chains,
            refused={str(site): str(why) for site, why in values["refused"].items()},
            readers=readers,
            unread=str(values["unread"]),
        )
