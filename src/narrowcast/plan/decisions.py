"""The way that a sum takes, coded or not and by which algorithm: a pure function of what every rank knows.

Few bits pay where they save more time than coding costs, halves of a prompt in turns where waiting costs more than a
second pass over the weights, an output layer on every rank where logits travel for longer than it takes to be read.
From which size on that is so depends on the link and on the machine: `narrowcast tune` measures it and writes the table
into the plan (perf/tune.py).
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from narrowcast.collectives import named

# As the plan codes it; in its own dtype, by our algorithms; or by the group's own all_reduce, outside the bit contract.
FORMS = "coded", "plain", "native"


class Choice(NamedTuple):
    """`form`: one of FORMS. `algorithm`: of coded and plain sums; "" for native.

    >>> str(Choice.parse("coded two_shot"))
    'coded two_shot'
    """

    form: str
    algorithm: str = ""

    def __str__(self) -> str:
        return f"{self.form} {self.algorithm}".strip()

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """The choice that `str` gave; ValueError if there is no such form."""
        form, _, algorithm = text.partition(" ")
        if form not in FORMS or (form == "native") is bool(algorithm):
            raise ValueError(f"a choice is one of {', '.join(FORMS)} with an algorithm, not {text!r}")
        if algorithm:
            named(algorithm)
        return cls(form, algorithm)


# Of a sum's waiting, what is counted on to be gained by halves in turns, which cost a second pass over the weights
# (decision 0034).
GAINED = 0.25
SHORTEST, LONGEST = 32, 1 << 20  # prompts that are asked about

# A chunk that travels by itself costs 0.35 ms of Python and of smaller products, and gains a part of its waiting.
LEAST_WAIT_OF_A_CHUNK_S = 1.4e-3

# Choices by the number of tokens from which on they are taken, ascending.
Thresholds = Sequence[tuple[int, Choice]]


@dataclass(frozen=True)
class Decisions:
    """Choices for sums of `num_features` values a token: for sites that the plan codes, and for all others.

    `transport`: the name of the one that they were measured over. `logits_s`: seconds that gathering one token's takes.
    `waits`: seconds that a rank waits in such a sum of so many tokens, by their ascending number. `weights_gbps`: the
    rate at which a product of few tokens reads its weights.
    """

    coded: Mapping[int, Thresholds] = field(default_factory=dict)
    plain: Mapping[int, Thresholds] = field(default_factory=dict)
    transport: str = ""
    waits: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)
    weights_gbps: float = 0.0
    logits_s: float = 0.0

    def choice(self, num_tokens: int, num_features: int, *, coded: bool) -> Choice | None:
        """The way for a sum of that size; None where nothing was measured."""
        thresholds = (self.coded if coded else self.plain).get(num_features)
        if not thresholds:
            return None
        place = bisect_right(thresholds, num_tokens, key=lambda threshold: threshold[0])
        return thresholds[max(place - 1, 0)][1]

    def halves_from(self, num_features: int, weight_nbytes: float) -> int | None:
        """The tokens from which on a prompt is to run in halves that take turns; None for never, or nothing measured.

        `weight_nbytes`: of the weights that a rank reads from one sum to the next.
        """
        waits = self.waits.get(num_features)
        if not waits:
            return None
        pass_s, num_tokens = weight_nbytes / (self.weights_gbps * 1e9), SHORTEST
        while num_tokens <= LONGEST:
            if GAINED * _interpolated(waits, num_tokens) > pass_s:
                return num_tokens
            num_tokens *= 2
        return None

    def output_layer_pays(self, nbytes: int) -> bool:
        """True if it takes longer to gather a token's logits than to read so many bytes of weights more."""
        return self.weights_gbps > 0 and nbytes / (self.weights_gbps * 1e9) < self.logits_s

    def chunks_pay(self, num_features: int, chunk_values: int) -> bool:
        """True if a large sum should travel in chunks of so many values; also where nothing was measured."""
        waits = self.waits.get(num_features)
        return not waits or _interpolated(waits, chunk_values // num_features) >= LEAST_WAIT_OF_A_CHUNK_S

    def to_json(self) -> dict[str, Any]:
        """All tables as JSON values."""
        return {
            "coded": _to_json(self.coded),
            "plain": _to_json(self.plain),
            "transport": self.transport,
            "waits": {str(num_features): [list(each) for each in waits] for num_features, waits in self.waits.items()},
            "weights_gbps": self.weights_gbps,
            "logits_s": self.logits_s,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Decisions":
        """The tables that `to_json` gave; KeyError, TypeError or ValueError if it gave none such."""
        return cls(
            coded=_from_json(values["coded"]),
            plain=_from_json(values["plain"]),
            transport=str(values["transport"]),
            waits={
                int(num_features): tuple((int(num_tokens), float(wait_s)) for num_tokens, wait_s in waits)
                for num_features, waits in values["waits"].items()
            },
            weights_gbps=float(values["weights_gbps"]),
            logits_s=float(values["logits_s"]),
        )


def _interpolated(waits: Sequence[tuple[int, float]], num_tokens: int) -> float:
    """Seconds for that many tokens, in proportion to them beyond the last number."""
    sizes, seconds = zip(*waits, strict=True)
    if num_tokens > sizes[-1]:
        return float(seconds[-1] * num_tokens / sizes[-1])
    return float(np.interp(num_tokens, sizes, seconds))


def _to_json(tables: Mapping[int, Thresholds]) -> dict[str, Any]:
    return {
        str(num_features): [[num_tokens, str(choice)] for num_tokens, choice in thresholds]
        for num_features, thresholds in tables.items()
    }


def _from_json(values: Mapping[str, Any]) -> dict[int, Thresholds]:
    return {
        int(num_features): tuple((int(num_tokens), Choice.parse(choice)) for num_tokens, choice in thresholds)
        for num_features, thresholds in values.items()
    }
