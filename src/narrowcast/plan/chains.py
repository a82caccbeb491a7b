"""Depth feedback in a plan: which sites leave what they lose to the next one, and why others do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TURNED_OFF = "the plan was calibrated without"


@dataclass(frozen=True, kw_only=True)
class Chains:
    """`chains`: sites in the order of execution, each of which leaves what it loses to the next one of its chain.

    A chain ends where the stream goes to another pipeline stage, or out of the model. `refused`: reasons by site why a
    sum is in none.
    """

    chains: Sequence[tuple[str, ...]] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def turned_off(self) -> "Chains":
        """No chains."""
        reasons = {site: TURNED_OFF for chain in self.chains for site in chain}
        return Chains(refused={**self.refused, **reasons})

    def joined(self, other: "Chains") -> "Chains":
        """Those of two ranks: of other stages, or the same."""
        new = tuple(chain for chain in other.chains if chain not in self.chains)
        return Chains(chains=(*self.chains, *new), refused={**self.refused, **other.refused})

    def to_json(self) -> dict[str, Any]:
        """Both as JSON values."""
        return {"chains": [list(chain) for chain in self.chains], "refused": dict(sorted(self.refused.items()))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Chains":
        """The chains that `to_json` gave; KeyError, TypeError or ValueError if it gave none such."""
        chains = tuple(tuple(map(str, chain)) for chain in values["chains"])
        if len(set().union(*chains)) < sum(map(len, chains)):
            raise ValueError("a site is in one chain once")
        return cls(chains=chains, refused={str(site): str(why) for site, why in values["refused"].items()})
