"""Sums and gathers as a plan says, written once for a real rank and for virtual ones: choice, counting."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import Hops, choose
from narrowcast.collectives.base import Deferred, Sent
from narrowcast.collectives.clock import Clock
from narrowcast.errors import PlanMismatchError
from narrowcast.plan.chains import Chains
from narrowcast.plan.decisions import Choice
from narrowcast.runtime.counters import SiteCounters
from narrowcast.runtime.feedback import Feedback
from narrowcast.runtime.operators import Operator
from narrowcast.runtime.products import Product
from narrowcast.runtime.reports import ONCE, Way
from narrowcast.runtime.sampling import sampled
from narrowcast.runtime.schedules import Recorder
from narrowcast.runtime.sites import Sites, plain
from narrowcast.runtime.wires import Wires


class PlannedWires(Wires):
    """Wires over which values travel coded, as `sites` say; bytes are those of the first of `ranks`.

    With `count_only` everything travels as it is, and the bytes that its codecs would send are counted. `recorder`, if
    there is one, is told of sums.
    """

    def __init__(self, sites: Sites, rank: int | None, tp_size: int, *, count_only: bool = False) -> None:
        num_sources = (tp_size, 1, max(len(sites.groups), 1)) if rank is None else (1, 1, 1)
        chains = Chains() if count_only else sites.chains
        Wires.__init__(self, rank, tp_size, Feedback(chains, num_sources))
        self.sites, self._count_only, self.deterministic = sites, count_only, sites.deterministic
        self.recorder: Recorder | None = None

    def row_parallel(self, site: str, products: Sequence[Product]) -> Operator:
        self._check_features(site, products[0].num_features)
        return super().row_parallel(site, products)

    def column_parallel(self, site: str, num_features: Sequence[int]) -> Operator:
        self._check_features(site, sum(num_features))
        return super().column_parallel(site, num_features)

    def _check_features(self, site: str, num_features: int) -> None:
        """PlanMismatchError unless the plan's codecs are of so many."""
        for codec in self.sites.hops(site, torch.float32).codecs:
            if codec.calibrated_features not in (None, num_features):
                raise PlanMismatchError(
                    f"plan, {site}",
                    expected=f"codecs of {num_features} features, as the model has",
                    found=codec.calibrated_features,
                    remedy="Calibrate this model.",
                )

    def sum_products(self, x: Tensor, site: str, residue: Tensor | None = None) -> Tensor:
        products = self.products(site)
        num_tokens, num_features = math.prod(x.shape[:-1]), products[0].num_features
        x_TF = x.reshape(num_tokens, x.shape[-1])  # a rank may hold no column
        choice = self.sites.choice(site, num_tokens, num_features, self.tp_size)
        partials = [_deferred(product, x_TF, self.counted(num_tokens)) for product in products]
        like = x.new_empty(0, dtype=products[0].dtype or x.dtype)
        total_TE = self._sum(partials, site, choice, like, residue)
        return total_TE.view(*x.shape[:-1], num_features)

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        x, num_features = partials[0], partials[0].shape[-1]
        flat = partials if x.dim() == 2 else [each.reshape(-1, num_features) for each in partials]
        choice = self.sites.choice(site, flat[0].shape[0], num_features, self.tp_size)
        if choice.form == "native":  # which adds up in place
            flat = [x_TE.clone() for x_TE in flat]
        total_TE = self._sum([Deferred.of(x_TE) for x_TE in flat], site, choice, x, residue)
        return total_TE if x.dim() == 2 else total_TE.view(x.shape)

    def _sum(
        self,
        partials: Sequence[Deferred],
        site: str,
        choice: Choice,
        like: Tensor,
        residue: Tensor | None,
    ) -> Tensor:
        """The sum [T, E] of `partials`, of the dtype and device of `like`."""
        shape, dtype = (partials[0].num_tokens, partials[0].num_features), like.dtype
        counters = self.sites.counters(site)
        sent = self.sites.traffic(site, choice, shape, dtype, self.ranks[0], self.tp_size)
        if self.recorder is not None:
            self.recorder.count(site, choice, sent, dtype.itemsize)
        if choice.form == "native":
            given = partials if residue is None else self.feedback.taken_along(partials, residue)
            y_TE, path = self._add_up_natively(given), "native"
        else:
            y_TE, path = self._add_up_by(choice, partials, like.new_empty(shape), residue, site, counters)
        counters.count(shape[0], Way(*choice, path), sent, dtype.itemsize)
        return y_TE

    def _add_up_by(
        self,
        choice: Choice,
        partials: Sequence[Deferred],
        y_TE: Tensor,
        residue: Tensor | None,
        site: str,
        counters: SiteCounters,
    ) -> tuple[Tensor, str]:
        """The sum, in `y_TE`, and the path that it took."""
        hops, algorithm = self.sites.hops(site, y_TE.dtype), choice.algorithm
        if self._count_only or choice.form != "coded":
            hops = plain(y_TE.dtype)
        if self._count_only:
            algorithm = choose("auto", hops, y_TE.shape[0], y_TE.shape[1], self.tp_size)
        elif counters.due and choice.form == "coded" and not _is_captured(y_TE):
            self._sample(partials, y_TE, hops, residue, algorithm, site, counters)
            return y_TE, "steps"
        return y_TE, self._add_up(partials, y_TE, hops, residue, algorithm, counters)

    def _sample(
        self,
        partials: Sequence[Deferred],
        y_TE: Tensor,
        hops: Hops,
        residue: Tensor | None,
        algorithm: str,
        site: str,
        counters: SiteCounters,
    ) -> None:
        """Fill `y_TE` as `_add_up` does, and compare some of its tokens with the exact sum of what was put in."""
        tokens = sampled(len(y_TE), self.sites.sample_tokens).to(y_TE.device)
        values = [partial.tokens(slice(None)) for partial in partials]
        given_RNE = torch.stack([x_TE[tokens].float() for x_TE in values])
        if residue is not None:
            given_RNE[0] += residue[:, tokens].sum(dim=0)
        exact_NE = self._exact_sum(given_RNE)
        clock = Clock()  # of this sum alone
        timed = replace(counters, clock=clock)
        self._add_up([Deferred.of(x_TE) for x_TE in values], y_TE, hops, residue, algorithm, timed)
        seen_RNE = y_TE[tokens].float().unsqueeze(0)
        if residue is not None and site in self.sites.chains.read and hops.codecs[0].feeds_back:
            seen_RNE = seen_RNE + residue[: len(self.ranks)][:, tokens]
            self.feedback.watch(counters.distributions)
        ratio = counters.samples.compare(seen_RNE, exact_NE, self.sites.expected_error(site, algorithm))
        counters.distributions.add(ratio, clock.seconds)
        if counters.clock is not None:
            counters.clock.add(clock)

    def _fed_back(self, hops: Hops, residue: Tensor | None) -> Hops:
        return hops if residue is None else self.feedback.hops(hops, residue)

    def gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        x, (start, stop) = parts[0], self._own_columns(site)
        flat = [part.flatten(0, -2) for part in parts]
        codec = self.sites.hops(site, x.dtype).codecs[0]
        nbytes = codec.part(start, stop).payload_nbytes(len(flat[0]), stop - start)
        sent = Sent.once((self.tp_size - 1) * nbytes, (self.tp_size - 1) * flat[0].numel())
        counters = self.count_once(site, "gather", x, len(flat[0]), sent)
        y_TE = self._gather_features(flat, self._used(codec, x), self.columns(site), counters)
        return y_TE.view(*x.shape[:-1], y_TE.shape[1])

    def gather_tokens(self, parts: Sequence[Tensor], site: str, num_tokens: Sequence[int]) -> Tensor:
        codec = self.sites.hops(site, parts[0].dtype).codecs[0]
        sent = payload(codec, parts[0].shape, self.tp_size - 1)
        counters = self.count_once(site, "gather", parts[0], sum(num_tokens), sent)
        return self._gather_tokens(parts, self._used(codec, parts[0]), num_tokens, counters)

    def all_to_all(self, parts: Sequence[Tensor], site: str, counts: Sequence[Sequence[int]]) -> list[Tensor]:
        x_TE, rank = parts[0], self.ranks[0]
        codec, num_sent = self.sites.hops(site, x_TE.dtype).codecs[0], sum(counts[rank]) - counts[rank][rank]
        sent = payload(codec, (num_sent, x_TE.shape[1]))
        counters = self.count_once(site, "dispatch", x_TE, 0, sent)  # pairs of a token and an expert are no tokens
        return self._all_to_all(parts, self._used(codec, x_TE), counts, counters)

    def _own_columns(self, site: str) -> tuple[int, int]:
        start = sum(self.columns(site)[: self.ranks[0]])
        return start, start + self.columns(site)[self.ranks[0]]

    def _used(self, planned: Codec, x: Tensor) -> Codec:
        return CastCodec(dtype=x.dtype) if self._count_only else planned

    def count_once(self, site: str, kind: str, x: Tensor, num_tokens: int, sent: Sent) -> SiteCounters:
        """The site's counters, with what is sent of values like `x` that are not added up."""
        counters = self.sites.counters(site, kind)
        counters.count(num_tokens, Way("coded" if counters.coded else "plain", ONCE, "steps"), sent, x.dtype.itemsize)
        return counters

    @abstractmethod
    def _add_up(
        self,
        partials: Sequence[Deferred],
        y_TE: Tensor,
        hops: Hops,
        residue: Tensor | None,
        algorithm: str,
        counters: SiteCounters,
    ) -> str:
        """Fill `y_TE` with the sum, and return the path that it took; a `residue` is taken along, and becomes what is
        lost.
        """

    @abstractmethod
    def _exact_sum(self, given_RNE: Tensor) -> Tensor:
        """The sum over all ranks of what each of `ranks` gives, in FP32."""

    @abstractmethod
    def _add_up_natively(self, partials: Sequence[Deferred]) -> Tensor:
        """The sum by whatever the ranks' group has for that."""

    @abstractmethod
    def _gather_features(
        self, parts: Sequence[Tensor], codec: Codec, num_features: Sequence[int], counters: SiteCounters
    ) -> Tensor:
        """All ranks' columns [T, E]."""

    @abstractmethod
    def _gather_tokens(
        self, parts: Sequence[Tensor], codec: Codec, num_tokens: Sequence[int], counters: SiteCounters
    ) -> Tensor:
        """All ranks' tokens [T, E]."""

    @abstractmethod
    def _all_to_all(
        self, parts: Sequence[Tensor], codec: Codec, counts: Sequence[Sequence[int]], counters: SiteCounters
    ) -> list[Tensor]:
        """The tokens that come to each of `ranks`."""


def _is_captured(x: Tensor) -> bool:
    """True where what runs is recorded as a CUDA graph, in which nothing can be read off the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _deferred(product: Product, x_TF: Tensor, num_tokens: int) -> Deferred:
    return Deferred(len(x_TF), product.num_features, lambda tokens: product(x_TF[tokens], num_tokens))


def payload(codec: Codec, shape: Sequence[int], copies: int = 1) -> Sent:
    """The traffic of so many copies of a payload [T, E]."""
    return Sent.once(copies * codec.payload_nbytes(*shape), copies * math.prod(shape))
