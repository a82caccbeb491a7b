"""Work for plans that ranks of vLLM can do, and of which an engine knows nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from narrowcast.codecs import Recipe
from narrowcast.errors import InvalidInputError
from narrowcast.plan import ModelFingerprint, Plan
from narrowcast.plan.decisions import Decisions
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.reports import Report
from narrowcast.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The sums that calibration watches on these ranks: `sites`, by a plan's names, of a `model` so `split`."""

    sites: Sequence[str]
    model: ModelFingerprint
    split: Split
    ranks: Transport
    device: torch.device


class Calibrate(Protocol):
    """Wires that watch, once they are asked to begin, so many tokens; on the first rank `on_plan` gets the plan."""

    def __call__(
        self,
        recipe: Recipe,
        num_tokens: int,
        watched: Watched,
        on_plan: Callable[[Plan | InvalidInputError], None],
    ) -> tuple[Communicator, Callable[[], None]]:
        """The wires, and what lets them begin."""
        ...


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of `rank` among all `num_ranks`, at any moment: `report`. `port`: where it is to tell them, too."""

    report: Callable[[], Report]
    plan: Plan | None
    rank: int
    num_ranks: int
    transport: str
    port: int | None


@dataclass(frozen=True, kw_only=True)
class Tools:
    """`tune`: the decisions for a plan's sums of a dtype over these ranks, all of which call it.

    `recipe`: that of a codec, or of the usual one for "", if live traffic is enough for it; else InvalidInputError.
    `publish`: let whoever shows figures know those of this rank from now on; InvalidInputError if its port is taken.
    `show`: have this process's /metrics show those of all ranks that its vLLM has on this machine.
    """

    tune: Callable[[Plan, Transport, torch.dtype], Decisions]
    recipe: Callable[[str], Recipe]
    calibrate: Calibrate
    publish: Callable[[Figures], None]
    show: Callable[[], None]
