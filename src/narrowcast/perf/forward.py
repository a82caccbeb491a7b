"""A forward by one codec: the bytes that it sends, and how long they are under way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from narrowcast.codecs import Codec, Ranges, Recipe
from narrowcast.collectives import ALGORITHMS, choose
from narrowcast.perf.census import Flow
from narrowcast.perf.cost import CostModel
from narrowcast.plan.decisions import Choice
from narrowcast.plan.split import SUMS, UNCODED, Split
from narrowcast.runtime.reports import SiteReport


class Coded(NamedTuple):
    """A flow, its codecs by hop (none where it travels as it is), and what is sent of it once."""

    flow: Flow
    codecs: tuple[Codec, ...]
    sent: SiteReport


@dataclass(frozen=True, kw_only=True)
class Forward:
    """All flows of a forward of `num_tokens` tokens, coded."""

    num_tokens: int
    parts: Sequence[Coded]

    @classmethod
    def of(cls, flows: Sequence[Flow], recipe: Recipe, split: Split, num_tokens: int) -> "Forward":
        """These flows by the codecs of `recipe`."""
        codecs = [_codecs(recipe, flow, split) for flow in flows]
        sent = [flow.sent(each, split.tp_size) for flow, each in zip(flows, codecs, strict=True)]
        return cls(num_tokens=num_tokens, parts=list(map(Coded, flows, codecs, sent)))

    def nbytes(self, site: str) -> int:
        """Payload bytes of a site."""
        return sum(part.flow.times * part.sent.wire_bytes for part in self.parts if part.flow.site == site)

    def bits_per_value(self) -> float:
        """Payload bits over values, of what is coded."""
        coded = [(part.flow.times, part.sent) for part in self.parts if part.codecs]
        num_values = sum(times * sent.num_values for times, sent in coded)
        return 8 * sum(times * sent.wire_bytes for times, sent in coded) / max(num_values, 1)

    def seconds(self, cost: CostModel, choice: Choice | None) -> float | None:
        """Seconds of all flows, one after the other, their sums by `choice`; None where those of a sum are unknown."""
        total = 0.0
        for part in self.parts:
            seconds = self._seconds(part, cost, choice)
            if seconds is None:
                return None
            total += part.flow.times * seconds
        return total

    def _seconds(self, part: Coded, cost: CostModel, choice: Choice | None) -> float | None:
        if choice is None or part.flow.kind not in SUMS:
            return cost.message_s(part.sent.wire_bytes)
        if choice.form == "native":
            return cost.sum_s(choice, self.num_tokens)
        if not part.codecs:  # by whichever algorithm is faster
            found = [cost.sum_s(way, self.num_tokens) for way in ways("plain")]
            return min((each for each in found if each is not None), default=None)
        runs = choose(choice.algorithm, cost.hops, self.num_tokens, cost.num_features, cost.world_size)
        return cost.sum_s(choice._replace(algorithm=runs), self.num_tokens)


def ways(form: str) -> list[Choice]:
    """All algorithms, in that form."""
    return [Choice(form, algorithm) for algorithm in ALGORITHMS]


def _codecs(recipe: Recipe, flow: Flow, split: Split) -> tuple[Codec, ...]:
    """The codecs by hop, for their sizes: no value matters."""
    if flow.kind in UNCODED:
        return ()
    sources = (split.tp_size, 1) if flow.kind == "sum" else (1,)
    return tuple(recipe.codec(Ranges.of(torch.ones(number, 1, flow.num_features))) for number in sources)
