"""Calibration from live traffic: ranks that serve look at what they send each other, and make a plan of it.

Ranges and second moments can be seen so. What takes other runs of the model is missing in such a plan, which says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Thread

import torch
from torch import Tensor

from narrowcast.calibration.fit import fit
from narrowcast.calibration.moments import MomentObserver, Moments
from narrowcast.calibration.observers import EMA_FACTOR, RangeObserver
from narrowcast.calibration.observing import GatheringCommunicator, ObservedWires, Observer
from narrowcast.codecs import Codec, FittedRecipe, Recipe, TransformRecipe, recipe
from narrowcast.errors import InvalidInputError
from narrowcast.plan import ModelFingerprint, Plan, Site
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Split
from narrowcast.runtime.communicator import Communicator
from narrowcast.transport import Transport

MISSING = "depth feedback and the own part exact, what an error costs by site, expected errors, KL divergence"
NOT_TRIED = "live traffic does not say which sums go into the stream: narrowcast calibrate tries that"
TINY = torch.finfo(torch.float32).tiny  # of a sum that is always zero
WINDOW = 256  # tokens whose ranges are averaged as those of a sequence: requests come in parts, down to single tokens


class WindowObserver:
    """The ranges of windows of tokens, whatever the sizes of the sums that they come in, for `ranges`."""

    def __init__(self, ranges: RangeObserver) -> None:
        self._ranges = ranges
        self._extremes: dict[str, Tensor] = {}  # least and largest of each rank's values, and of the sum: [2, R + 1, E]
        self._num_tokens: dict[str, int] = {}

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        """Look at partial sums [T, E] and their sum; with the last token of a window, `ranges` does."""
        both = [torch.stack(torch.aminmax(x.flatten(0, -2), dim=0)) for x in (*partials, total)]
        new = torch.stack(both, dim=1)
        old = self._extremes.get(site, new)
        self._extremes[site] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])
        self._num_tokens[site] = self._num_tokens.get(site, 0) + total.shape[:-1].numel()
        if self._num_tokens[site] >= WINDOW:
            self.end(site)

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Only sums are calibrated so."""

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Only sums are calibrated so."""

    def end(self, site: str) -> None:
        """End the site's window, if one has begun: its extremes have the ranges that all of its tokens have."""
        if site in self._extremes:
            *partials, total = self._extremes.pop(site).unbind(dim=1)
            del self._num_tokens[site]
            self._ranges.see_sum(partials, total, site)


class LiveCommunicator(GatheringCommunicator):
    """A rank whose sums are exact, and seen by the first rank until `num_tokens` have been seen at each of `sites`.

    From `begin` on: what an engine runs to warm up is nothing to calibrate on. The first rank passes the plan of
    `split` to `on_plan`, or the error that there is none, in a thread of its own: the others do not wait for it.
    """

    def __init__(
        self,
        sites: Sequence[str],
        recipe: Recipe,
        num_tokens: int,
        *,
        tp: Transport,
        device: torch.device,
        split: Split,
        model: ModelFingerprint,
        on_plan: Callable[[Plan | InvalidInputError], None],
    ) -> None:
        self._ranges, self._moments = RangeObserver("count", 0), MomentObserver()
        self._windows = WindowObserver(self._ranges)
        observers: list[Observer] = [self._windows, self._moments] if tp.rank == 0 else []
        super().__init__(ObservedWires(observers, tp.world_size), tp, None, device=device)
        self._planned, self._recipe, self._num_tokens = tuple(sites), recipe, num_tokens
        self._split, self._model, self._on_plan = split, model, on_plan
        self.thread: Thread | None = None
        self._missing: dict[str, int] = {}  # tokens yet to be seen, by site: the same on every rank

    def begin(self) -> None:
        """Look at sums from now on."""
        self._missing = dict.fromkeys(self._planned, self._num_tokens)

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        if site not in self._missing:
            return Communicator.sum(self, partials, site, residue)
        total = super().sum(partials, site, residue)
        self._missing[site] -= total.shape[:-1].numel()
        if self._missing[site] <= 0:
            del self._missing[site]
            if not self._missing and self.tp.rank == 0:
                self.thread = Thread(target=self._end, name="narrowcast plan")
                self.thread.start()
        return total

    def _end(self) -> None:
        try:
            with torch.inference_mode():  # in which an engine may have run what was seen
                found: Plan | InvalidInputError = self._plan()
        except InvalidInputError as error:
            found = error
        self._on_plan(found)

    def _plan(self) -> Plan:
        """The plan of all that was seen."""
        for site in self._planned:
            self._windows.end(site)
        about = {"num_tokens": self._num_tokens, "ema_factor": EMA_FACTOR, "seen": "live traffic", "missing": MISSING}
        if isinstance(self._recipe, FittedRecipe):
            about["bits"] = self._recipe.bits or self._recipe.default_bits
        return Plan(
            split=self._split,
            model=self._model,
            calibration={"codec": str(self._recipe), **about},
            sites=dict(self._sites()),
            feedback=Chains(refused=dict.fromkeys(self._planned, NOT_TRIED), unread=NOT_TRIED),
        )

    def _sites(self) -> Iterator[tuple[str, Site]]:
        asked, ranges = self._recipe, self._ranges.ranges(self._planned)
        if isinstance(asked, FittedRecipe):
            algorithm, bits = asked.algorithm_among(self.tp_size), asked.bits or asked.default_bits
            codecs: Mapping[str, Sequence[Codec]] = fit(self._moments_alike(), asked, bits=bits, algorithm=algorithm)
        else:
            codecs = {site: tuple(asked.codec(seen) for seen in ranges[site]) for site in self._planned}
        for site in self._planned:
            yield site, Site(kind="sum", codecs=tuple(codecs[site]), error={})

    def _moments_alike(self) -> dict[str, Moments]:
        """The moments, an error costing as much as it is large beside its sum: what trying finds is not known here."""
        means = self._moments.means()
        return {
            site: Moments(partial=partial, total=total, fisher=1 / total.mean().clamp(min=TINY).expand(total.shape[-1]))
            for site, (partial, total) in ((site, means[site]) for site in self._planned)
        }


def live_recipe(codec: str) -> Recipe:
    """The recipe of a codec; InvalidInputError where it takes more than live traffic says."""
    found = recipe(codec)
    if isinstance(found, TransformRecipe) or (isinstance(found, FittedRecipe) and found.target_kl is not None):
        raise InvalidInputError(
            f"codec {codec}",
            expected="one of ranges or variances, such as int4-feature or allocated(bits=4)",
            found="one that takes gradients or a reference, which live traffic has not",
            remedy="Choose another, or calibrate with narrowcast calibrate.",
        )
    return found
