"""Depth feedback: what a rank's payload lost at one site is added to what it sends at the next, for the same token.

In a pre-norm transformer sums are added to the residual stream as they are, so that the stream carries the loss of the
last site alone and not that of all. Where a sum travels again, what its coding loses is fed back likewise, by whoever
owns a token. docs/method.md derives it; decision 0026 says why it stands in for codecs.

Until then a rank knows of the stream what the others do not: what its own payload lost. All ranks go on with the same
stream, bit for bit, but each computes its share of a block from the stream with its own loss made good (decision 0029).

Shapes: T tokens, E features, S sources of a hop that code here.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from narrowcast.codecs import Codec
from narrowcast.collectives import Hops
from narrowcast.collectives.base import Deferred
from narrowcast.plan.chains import Chains
from narrowcast.runtime.sampling import Distributions

DTYPE = torch.float32  # of what was lost


class FeedbackCodec:
    """Stands in for `codec` in the steps of an algorithm: adds what was lost before, and keeps what is lost now.

    `residue`: [S, T, E] of the tokens and features that are coded; S is 1 where one source codes here.
    """

    def __init__(self, codec: Codec, residue_STE: Tensor) -> None:
        self._codec, self._residue_STE = codec, residue_STE

    def encode(self, x_TE: Tensor, *, source: int, out: Tensor | None = None, stats: Tensor | None = None) -> Tensor:
        """The payload of `x_TE` and of what was lost before."""
        residue_TE = self._residue_STE[source if len(self._residue_STE) > 1 else 0]
        return self._codec.encode(x_TE, source=source, out=out, stats=stats, residue=residue_TE)

    def recode(
        self,
        payloads_RTB: Tensor,
        reduced: "FeedbackCodec",
        *,
        num_features: int,
        out: Tensor,
        stats: Tensor | None = None,
    ) -> Tensor:
        """The payload of the sum and of what was lost of sums before."""
        total_TE = self._codec.decode_sum(payloads_RTB, num_features=num_features)
        return reduced.encode(total_TE, source=0, out=out, stats=stats)

    def tokens(self, own: slice) -> "FeedbackCodec":
        """A stand-in for the codec of some tokens."""
        return FeedbackCodec(self._codec.tokens(own), self._residue_STE[:, own])

    def features(self, start: int, stop: int) -> "FeedbackCodec":
        """A stand-in for the codec of a block of features."""
        return FeedbackCodec(self._codec.features(start, stop), self._residue_STE[:, :, start:stop])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)


@dataclass(frozen=True)
class Place:
    """A site's place among those of a forward that feed back one into the next."""

    chain: int
    index: int
    last: bool


@dataclass
class Loss:
    """The loss of a forward so far. `following`: the place of the site that may take it, chain and index.

    `inputs`: what a norm made of the stream on each rank that computes here. `watched_by`: who is to see the loss
    beside the stream, when it is read.
    """

    residue: Tensor | None = None
    following: tuple[int, int] = (0, 0)
    inputs: Sequence[Tensor] = ()
    watched_by: Distributions | None = None


class Feedback:
    """The loss of a forward so far, of the ranks that compute here: zero before a chain's first site, dropped after its
    last.

    `chains`: which sites leave their loss to the next one, and who reads the stream in between.
    `num_sources`: by hop, those that code here, of which each row of a residue [rows, T, E] is one's.
    """

    def __init__(self, chains: Chains = Chains(), num_sources: Sequence[int] = (1,)) -> None:
        self._places = {
            site: Place(number, index, index == len(chain) - 1)
            for number, chain in enumerate(chains.chains)
            for index, site in enumerate(chain)
        }
        self.readers = {} if chains.unread else chains.readers
        self._fed = {module for reader in self.readers.values() for module in reader.modules}
        self._num_sources = list(num_sources)
        self._losses = defaultdict[int, Loss](Loss)
        self._loss = self._losses[0]

    def enter(self, part: int) -> None:
        """Go on with that part of a forward, where parts take turns: each loses for itself."""
        self._loss = self._losses[part]

    @property
    def any(self) -> bool:
        """Some sites feed back."""
        return bool(self._places)

    def residue(self, site: str, num_tokens: int, num_features: int, device: torch.device) -> Tensor | None:
        """The loss that the site before has left, for this one to add and to replace; None where none is fed back.

        Zeros, unless the last sum was of the site before and of as many tokens.
        """
        place = self._places.get(site)
        if place is None:
            return None
        loss, shape = self._loss, (sum(self._num_sources), num_tokens, num_features)
        residue, here = loss.residue, (place.chain, place.index)
        if residue is None or loss.following != here or residue.shape != shape or place.index == 0:
            residue = torch.zeros(shape, dtype=DTYPE, device=device)
        loss.residue, loss.following = None if place.last else residue, (place.chain, place.index + 1)
        if place.last:
            loss.inputs = ()
        return residue

    def goes_on(self, site: str, num_tokens: int, num_features: int) -> bool | None:
        """True if `residue` would give what was left, False if nothing was; None for what was left to another sum."""
        loss, place = self._loss, self._places.get(site)
        if loss.residue is None:
            return False
        here = None if place is None or place.index == 0 else (place.chain, place.index)
        is_mine = loss.following == here and loss.residue.shape[1:] == (num_tokens, num_features)
        return True if is_mine else None

    def read(self, norm: str, stream: Tensor, forward: Callable[[Tensor], Tensor], ranks: Sequence[int]) -> Tensor:
        """Apply a norm's `forward` to the `stream` [..., E] that all ranks share, and keep what `keep` says."""
        self.keep(norm, stream, forward, ranks)
        return forward(stream)

    def keep(self, norm: str, stream: Tensor, forward: Callable[[Tensor], Tensor], ranks: Sequence[int]) -> None:
        """Keep for its modules what a norm's `forward` makes of the `stream` with the last loss of each of `ranks`."""
        loss, num_tokens = self._loss, math.prod(stream.shape[:-1])
        residue, loss.inputs = loss.residue, ()
        if residue is not None and residue.shape[1:] == (num_tokens, stream.shape[-1]):
            scale, many = self.readers[norm].scale, self._num_sources[0] > 1
            own = [residue[rank if many else 0].view(stream.shape) for rank in ranks]
            if loss.watched_by is not None:
                loss.watched_by.see_stream(own[0], scale, stream)
            loss.inputs = [forward(torch.add(stream, lost, alpha=scale).to(stream.dtype)) for lost in own]
        loss.watched_by = None

    def watch(self, distributions: Distributions) -> None:
        """Let `samples` see the loss so far, when it is read."""
        self._loss.watched_by = distributions

    def inputs(self, module: str, x: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
        """The inputs from which a module, called with `x`, is to compute each rank's share."""
        if module not in self._fed or not self._loss.inputs:
            return [x] * len(ranks)
        return [each.view(x.shape) for each in self._loss.inputs]

    def hops(self, hops: Hops, residue: Tensor) -> Hops:
        """The same hops, with codecs that feed back; those that do not leave the residue to later sites."""
        rows = residue.split(self._num_sources)
        codecs = tuple(
            cast(Codec, FeedbackCodec(codec, own_STE)) if codec.feeds_back else codec
            for codec, own_STE in zip(hops.codecs, rows, strict=False)
        )
        return replace(hops, codecs=codecs)

    def taken_along(self, partials: Sequence[Deferred], residue: Tensor) -> list[Deferred]:
        """Partial sums that travel uncoded, by whatever the group has for that: they take all along, and lose nothing.

        Of sums that were coded again a token's owner alone has the loss; simulated, one rank takes all of it.
        """
        own, *others = residue.clone().split(self._num_sources)
        residue.zero_()
        lost = [row.clone() for row in own]
        for rows in others:
            lost[0] += rows.sum(dim=0)
        return [_plus(partial, lost_TE) for partial, lost_TE in zip(partials, lost, strict=True)]


def _plus(partial: Deferred, lost_TE: Tensor) -> Deferred:
    def tokens(own: slice) -> Tensor:
        x_TE = partial.tokens(own)
        return (x_TE.float() + lost_TE[own]).to(x_TE.dtype)

    return replace(partial, tokens=tokens)


def common_unit(codecs: Mapping[str, Sequence[Codec]]) -> int:
    """Features that stay together at all of these sites, so that blocks of features have one owner in a forward."""
    units = [codec.granularity for hops in codecs.values() for codec in hops]
    return math.lcm(*(unit for unit in units if unit is not None))
