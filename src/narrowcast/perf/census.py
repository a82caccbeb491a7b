"""A count of what travels in one forward of a split model, made on its skeleton: shapes, and not a value.

Sites that differ in their layer's number alone are one, with a star for the number.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.calibration.running import travelling_over
from narrowcast.codecs import Codec
from narrowcast.engines import device_of, engine_of
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import SiteCodecs
from narrowcast.runtime.counters import SiteReport
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.wires import Wires

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Flow:
    """Values of one shape that travel at a site, `times` in a forward: `send` lets them travel over other wires."""

    site: str
    kind: str
    num_tokens: int
    num_features: int
    send: Callable[[Wires], Tensor]
    times: int = 0

    def sent(self, codecs: Sequence[Codec]) -> SiteReport:
        """Traffic of the first rank (of a stage) for one of them, coded by hop with `codecs`; with none, as it is."""
        sites = SiteCodecs({self.site: codecs} if codecs else {}, (), "auto", CPU)
        self.send(Simulator(sites, count_only=True))
        return sites.monitor.report().sites[self.site]


class Census(Wires):
    """Wires on which values travel as they are, and that note each shape of each site."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self._kinds = {starred(site): kind for site, kind in kinds.items()}
        self._uncoded = Simulator(SiteCodecs({}, (), "auto", CPU), count_only=True)
        self._flows: dict[tuple[object, ...], Flow] = {}

    @property
    def flows(self) -> list[Flow]:
        """All that travelled, in the order in which it first did."""
        return list(self._flows.values())

    def all_reduce(self, partials: Sequence[Tensor], site: str) -> Tensor:
        """Note a sum."""
        return self._note(site, partials[0].shape, methodcaller("all_reduce", partials, starred(site)))

    def all_gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        """Note features that are put side by side."""
        shape = *parts[0].shape[:-1], sum(part.shape[-1] for part in parts)
        return self._note(site, shape, methodcaller("all_gather_features", parts, starred(site)))

    def move(self, x: Tensor, site: str, num_sent: int) -> Tensor:
        """Note what goes to another rank."""
        return self._note(site, (num_sent, *x.shape), methodcaller("move", x, starred(site), num_sent))

    def all_to_all(self, x_PE: Tensor, site: str, num_sent: int) -> Tensor:
        """Note pairs of a token and an expert."""
        return self._note(site, (num_sent, *x_PE.shape), methodcaller("all_to_all", x_PE, starred(site), num_sent))

    def _note(self, site: str, shape: Sequence[int], send: Callable[[Wires], Tensor]) -> Tensor:
        name = starred(site)
        flow = self._flows.setdefault(
            (name, *shape),
            Flow(
                site=name,
                kind=self._kinds[name],
                num_tokens=math.prod(shape[:-1]),
                num_features=shape[-1],
                send=send,
            ),
        )
        flow.times += 1
        return send(self._uncoded)


def census(model: nn.Module, split: Split, num_tokens: int) -> list[Flow]:
    """The flows of a forward of `num_tokens` tokens by a whole model, perhaps without values, split as `split` says.

    Logits travel for the last token only, as in generation.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    ids = torch.randint(config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    wires = Census(engine_of(model).sites(model, split))
    with travelling_over(wires, model, split), torch.no_grad():
        # Without a cache Transformers looks at the values of positions, which a skeleton does not have.
        model(input_ids=ids.to(device_of(model)), use_cache=True, logits_to_keep=1)
    return wires.flows


def starred(site: str) -> str:
    """The name of a site, with a star for the number of its layer.

    >>> starred("model.layers.3.mlp.down_proj")
    'model.layers.*.mlp.down_proj'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", site)
