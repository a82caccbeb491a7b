"""A count of what travels in one forward of a split model, made on its skeleton: shapes, and not a value.

Sites that differ in their layer's number alone are one, with a star for the number.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.calibration.observing import ObservedWires
from narrowcast.codecs import Codec
from narrowcast.engines import device_of, engine_of
from narrowcast.engines.forwards import evaluating
from narrowcast.plan.split import Split
from narrowcast.runtime.operators import Operator
from narrowcast.runtime.products import Product
from narrowcast.runtime.reports import SiteReport
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites

CPU = torch.device("cpu")

Send = Callable[[Simulator, str], object]  # lets values of a shape travel at a site


@dataclass(kw_only=True)
class Flow:
    """Values of one shape that travel at a site, `times` in a forward, and how they are sent."""

    site: str
    kind: str
    num_features: int
    send: Send
    times: int = 0

    def sent(self, codecs: Sequence[Codec], tp_size: int) -> SiteReport:
        """Traffic of the first rank (of a stage) for one of them, coded by hop with `codecs`; with none, as it is."""
        sites = Sites({self.site: codecs} if codecs else {}, (), "auto", CPU)
        self.send(Simulator(sites, tp_size, count_only=True), self.site)
        return sites.report().sites[self.site]


@dataclass(frozen=True)
class Noting(Operator):
    """An operator that notes what it is given, which may have a shape alone, and then runs."""

    note: Callable[[Tensor], None]

    def __call__(self, x: Tensor) -> Tensor:
        self.note(x)
        return super().__call__(x)


class Census(ObservedWires):
    """Wires on which values travel as they are, and that note each shape of each site."""

    def __init__(self, kinds: Mapping[str, str], tp_size: int) -> None:
        super().__init__((), tp_size)
        self._kinds = {starred(site): kind for site, kind in kinds.items()}
        self.flows: dict[tuple[object, ...], Flow] = {}  # in the order in which they first travelled

    def row_parallel(self, site: str, products: Sequence[Product]) -> Operator:
        super().row_parallel(site, products)
        num_features, dtype = products[0].num_features, products[0].dtype
        return Noting(
            "row_parallel", site, self, lambda x: self._sum(site, (*x.shape[:-1], num_features), dtype or x.dtype)
        )

    def partial_sums(self, site: str) -> Operator:
        return Noting("all_reduce", site, self, lambda x: self._sum(site, x.shape[1:], x.dtype))

    def column_parallel(self, site: str, num_features: Sequence[int]) -> Operator:
        super().column_parallel(site, num_features)

        def note(x: Tensor) -> None:
            def send(simulator: Simulator, name: str) -> None:
                simulator.column_parallel(name, num_features)
                simulator.gather_features(_empty(x.shape, x.dtype).split(list(num_features), dim=-1), name)

            self._note(site, x.shape, send)

        return Noting("all_gather", site, self, note, adds_up=False)

    def gather_tokens(self, parts: Sequence[Tensor], site: str, num_tokens: Sequence[int]) -> Tensor:
        self._note(site, parts[0].shape, lambda simulator, name: simulator.gather_tokens(parts, name, num_tokens))
        return super().gather_tokens(parts, site, num_tokens)

    def all_to_all(self, parts: Sequence[Tensor], site: str, counts: Sequence[Sequence[int]]) -> list[Tensor]:
        shape = sum(map(sum, counts)), sum(counts[0]) - counts[0][0], parts[0].shape[1]
        self._note(site, shape, lambda simulator, name: simulator.all_to_all(parts, name, counts))
        return super().all_to_all(parts, site, counts)

    def move(self, x: Tensor, site: str, copies: int) -> Tensor:
        if copies:  # none where ObservedWires has gathered them already
            self._note(site, x.shape, lambda simulator, name: simulator.move(x, name, copies))
        return super().move(x, site, copies)

    def _sum(self, site: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        partials = [_empty(shape, dtype)] * self.tp_size
        self._note(site, shape, lambda simulator, name: simulator.sum(partials, name))

    def _note(self, site: str, shape: Sequence[int], send: Send) -> None:
        name = starred(site)
        new = Flow(site=name, kind=self._kinds[name], num_features=shape[-1], send=send)
        self.flows.setdefault((name, *shape), new).times += 1


def census(model: nn.Module, split: Split, num_tokens: int) -> list[Flow]:
    """The flows of a forward of `num_tokens` tokens by a whole model, perhaps without values, split as `split` says.

    Logits travel for the last token only, as in generation.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    ids = torch.randint(config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    engine = engine_of(model)
    wires = Census(engine.sites(model, split), split.tp_size)
    forwards = engine.take_over(model, split, wires)
    try:
        with evaluating(model), torch.no_grad():
            # Without a cache Transformers looks at the values of positions, which a skeleton does not have.
            model(input_ids=ids.to(device_of(model)), use_cache=True, logits_to_keep=1)
    finally:
        forwards.restore()
    return list(wires.flows.values())


def starred(site: str) -> str:
    """The name of a site, with a star for the number of its layer.

    >>> starred("model.layers.3.mlp.down_proj")
    'model.layers.*.mlp.down_proj'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", site)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Values [T, E] that have a shape alone."""
    return torch.empty(math.prod(shape[:-1]), shape[-1], dtype=dtype, device="meta")
