"""Codecs at work: looks up a site's codecs, runs the collective, counts what travels.

`Communicator` works on the ranks of a split model. A site without codecs travels as it is; with `count_only` every
site does, and what its codecs would send is counted.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.codecs import CastCodec, Codec
from narrowcast.collectives import (
    Pending,
    Stages,
    all_gather_features_steps,
    all_gather_steps,
    all_to_all_steps,
    broadcast_steps,
    choose,
    deferred_all_reduce_steps,
    named,
    recv_steps,
    send_steps,
)
from narrowcast.collectives.base import Deferred, Steps, Traffic
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.transform import Transform
from narrowcast.runtime.counters import Monitor, SiteCounters
from narrowcast.transport import Transport

Codecs = Mapping[str, Sequence[Codec]]


class SiteCodecs:
    """The codecs of sites on one device, with counters. Where there are none, values travel in their own dtype.

    `algorithm`: that of coded sums; with "auto" the one that `decisions` name, or else sends fewest bytes.
    `deterministic`: one choice for all sizes, the one that a single token takes, always coded where there are codecs.
    """

    def __init__(
        self,
        codecs: Codecs,
        groups: Sequence[Sequence[int]],
        algorithm: str,
        device: torch.device,
        *,
        transforms: Mapping[str, Transform] = MappingProxyType({}),
        decisions: Decisions = Decisions(),
        deterministic: bool = False,
    ) -> None:
        nodes = tuple(tuple(group) for group in groups)
        self._transforms = {name: transform.to(device) for name, transform in transforms.items()}
        mixes = {name: each.remix.mix for name, each in self._transforms.items() if each.remix is not None}
        self._coded = {name: Stages(tuple(stages), nodes, mixes.get(name)) for name, stages in codecs.items()}
        self._folded: dict[tuple[str, int], Tensor] = {}
        self._algorithm, self._deterministic = algorithm, deterministic
        self.decisions = decisions if algorithm == "auto" and not deterministic else Decisions()
        self._algorithms: dict[tuple[str, str, int, int], str] = {}
        self.monitor = Monitor(device)

    def of(self, site: str, x: Tensor) -> Stages:
        """The codecs by stage for values like `x`."""
        return self._coded.get(site) or plain(x.dtype)

    def counters(self, site: str) -> SiteCounters:
        """The site's counters."""
        return self.monitor.site(site, coded=site in self._coded)

    def transform(self, site: str, choice: Choice) -> Transform | None:
        """The transform of a site whose sums, taking that way, are of components."""
        return self._transforms.get(site) if choice.form == "coded" else None

    def folded(self, site: str, weight_EF: Tensor, rank: int) -> Tensor:
        """The weights of `rank` that compute its components of the site, made at first use."""
        if (site, rank) not in self._folded:
            self._folded[site, rank] = self._transforms[site].fold(weight_EF, rank)
        return self._folded[site, rank]

    def choice(self, site: str, num_tokens: int, num_features: int, world_size: int) -> Choice:
        """The way that a sum of `num_features` takes."""
        form, algorithm = ("coded", self._algorithm) if site in self._coded else ("plain", "auto")
        decided = self.decisions.choice(num_tokens, num_features, coded=form == "coded")
        form, algorithm = decided or (form, algorithm)
        if form == "native":
            return Choice(form)
        if form == "coded" and site in self._transforms:
            num_features = self._transforms[site].num_components
        few_tokens = 1 if self._deterministic else min(num_tokens, world_size)  # more do not change the algorithm
        key = site if form == "coded" else "", algorithm, few_tokens, num_features
        if key not in self._algorithms:
            stages = self._coded[site] if form == "coded" else plain(torch.float32)
            self._algorithms[key] = choose(algorithm, stages, few_tokens, num_features, world_size)
        return Choice(form, self._algorithms[key])


@functools.cache
def plain(dtype: torch.dtype) -> Stages:
    """The stages of values that travel as they are."""
    return Stages((CastCodec(dtype=dtype),) * 2)


class Communicator:
    """What one rank sends and receives: `tp` joins the ranks that share its layers, `pp` the stages of its pipeline."""

    def __init__(
        self,
        codecs: SiteCodecs,
        *,
        tp: Transport | None,
        pp: Transport | None,
        count_only: bool = False,
    ) -> None:
        self._tp, self.pp, self._codecs, self._count_only = tp, pp, codecs, count_only

    @property
    def tp(self) -> Transport:
        """The tensor-parallel ranks."""
        assert self._tp is not None, "only a model with shared layers asks"
        return self._tp

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        """Sum partial sums `x` [..., E], whose memory the sum may take."""
        x_TE, rank = x.reshape(-1, x.shape[-1]), self.tp.rank
        choice = self._codecs.choice(site, len(x_TE), x_TE.shape[1], self.tp.world_size)
        if (transform := self._codecs.transform(site, choice)) is not None and not self._count_only:
            components = Deferred(
                len(x_TE), transform.num_components, lambda own: transform.analyze(x_TE[own], rank).to(x.dtype)
            )
            return self._sum_of_components(components, x_TE, site, transform, choice).view(x.shape)
        y_TE = x_TE if x.is_contiguous() else torch.empty_like(x_TE)
        return self._sum(Deferred.of(x_TE), y_TE, site, choice).view(x.shape)

    def all_reduce_linear(self, x: Tensor, weight: Tensor, site: str) -> Tensor:
        """Sum `x` [..., F] times `weight` [E, F] over the ranks: products of the next tokens while others travel."""
        num_tokens, num_features = math.prod(x.shape[:-1]), weight.shape[0]
        x_TF = x.reshape(num_tokens, x.shape[-1])  # a rank may hold no column
        choice = self._codecs.choice(site, num_tokens, num_features, self.tp.world_size)
        if (transform := self._codecs.transform(site, choice)) is not None and not self._count_only:
            folded_KF = self._codecs.folded(site, weight, self.tp.rank)
            components = self._components(x_TF, folded_KF, transform)
            y_TE = self._sum_of_components(components, x_TF, site, transform, choice)
        else:
            products = Deferred(num_tokens, num_features, lambda own: functional.linear(x_TF[own], weight))
            y_TE = self._sum(products, x.new_empty(num_tokens, num_features), site, choice)
        return y_TE.view(*x.shape[:-1], num_features)

    def _components(self, x_TF: Tensor, folded_KF: Tensor, transform: Transform) -> Deferred:
        """This rank's own components among zeros."""
        rank = self.tp.rank
        return Deferred(
            len(x_TF),
            transform.num_components,
            lambda tokens: transform.placed(functional.linear(x_TF[tokens], folded_KF), rank),
        )

    def _sum_of_components(
        self, components: Deferred, like: Tensor, site: str, transform: Transform, choice: Choice
    ) -> Tensor:
        """Features [T, E] of the summed components."""
        remixed = choice.algorithm == "two_shot"
        z_TJ = like.new_empty(components.num_tokens, transform.num_reduced if remixed else transform.num_components)
        return transform.synthesize(self._sum(components, z_TJ, site, choice), remixed=remixed)

    def _sum(self, x: Deferred, y_TE: Tensor, site: str, choice: Choice) -> Tensor:
        """The sum, in `y_TE` or in memory of its own."""
        num_tokens, dtype, transform = x.num_tokens, y_TE.dtype, self._codecs.transform(site, choice)
        num_features = x.num_features if transform is None else transform.num_features
        planned = self._codecs.of(site, y_TE) if choice.form == "coded" else plain(dtype)

        def sent() -> Traffic:
            rank, world_size = self.tp.rank, self.tp.world_size
            return traffic_of(choice, planned, num_tokens, num_features, rank, world_size, transform)

        if choice.form == "native":
            self._codecs.counters(site).count(num_tokens, sent(), dtype.itemsize)
            return self.tp.native_all_reduce(x.tokens(slice(None)))
        stages, algorithm = planned, choice.algorithm
        if self._count_only:
            stages = plain(dtype)
            algorithm = choose("auto", stages, num_tokens, num_features, self.tp.world_size)
        steps = deferred_all_reduce_steps(x, y_TE, stages, self.tp, algorithm, self._stats(site))
        return self._drive(steps, self.tp, site, num_tokens, dtype, sent, transform=transform)

    def all_gather_features(self, x: Tensor, site: str, num_features: Sequence[int]) -> Tensor:
        """Put the last dimensions of all ranks side by side; rank r holds `num_features[r]` of it."""
        rank, peers = self.tp.rank, self.tp.world_size - 1
        x_TE, own = x.flatten(0, -2), _block(num_features, self.tp.rank)  # a rank may hold no column
        planned = self._codecs.of(site, x).codecs[0]

        def sent() -> Traffic:
            nbytes = planned.part(own.start, own.stop).payload_nbytes(*x_TE.shape)
            return Traffic(peers * nbytes, peers * x_TE.numel())

        steps = all_gather_features_steps(x_TE, self._used(planned, x), num_features, rank, self._stats(site))
        y_TE = self._drive(steps, self.tp, site, len(x_TE), x.dtype, sent)
        return y_TE.view(*x.shape[:-1], -1)

    def all_gather_tokens(self, x_TE: Tensor, site: str, num_tokens: Sequence[int]) -> Tensor:
        """The tokens of all ranks in rank order; rank r holds `num_tokens[r]` of them."""
        planned, peers = self._codecs.of(site, x_TE).codecs[0], self.tp.world_size - 1
        steps = all_gather_steps(x_TE, self._used(planned, x_TE), num_tokens, self.tp.rank, self._stats(site))
        return self._drive(
            steps, self.tp, site, sum(num_tokens), x_TE.dtype, lambda: _copies(planned, x_TE.shape, peers)
        )

    def all_to_all(self, x_TE: Tensor, site: str, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """The tokens for each rank, in rank order, sent there; what comes from each, in rank order."""
        planned, rank = self._codecs.of(site, x_TE).codecs[0], self.tp.rank
        steps = all_to_all_steps(x_TE, self._used(planned, x_TE), send_counts, recv_counts, rank, self._stats(site))
        shape = torch.Size((sum(send_counts) - send_counts[rank], x_TE.shape[1]))
        return self._drive(steps, self.tp, site, 0, x_TE.dtype, lambda: _copies(planned, shape, 1))

    def send(self, x: Tensor, site: str, *, dst: int) -> None:
        """Send `x` [..., E] to stage `dst`."""
        assert self.pp is not None, "only a pipeline sends from stage to stage"
        x_TE, planned = x.reshape(-1, x.shape[-1]), self._codecs.of(site, x).codecs[0]
        rank, num_stages = self.pp.rank, self.pp.world_size
        steps = send_steps(x_TE, self._used(planned, x), dst, rank, num_stages, self._stats_of_stage(site))
        pair = rank, dst
        self._drive(steps, self.pp, site, len(x_TE), x.dtype, lambda: _copies(planned, x_TE.shape, 1), pair=pair)

    def recv(self, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What stage `src` sends: [..., E] of that shape."""
        assert self.pp is not None, "only a pipeline sends from stage to stage"
        y_TE = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=dtype, device=device)
        codec = self._used(self._codecs.of(site, y_TE).codecs[0], y_TE)
        steps, pair = recv_steps(y_TE, codec, src, self.pp.world_size), (src, self.pp.rank)
        self._drive(steps, self.pp, site, len(y_TE), dtype, lambda: Traffic(0, 0), pair=pair)
        return y_TE.view(*shape)

    def broadcast(
        self, x: Tensor | None, shape: Sequence[int], site: str, *, src: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """What stage `src` holds, `x` [..., E] of that shape there, at every stage."""
        assert self.pp is not None, "only a pipeline sends from stage to stage"
        y_TE = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=dtype, device=device)
        planned, (rank, num_stages) = self._codecs.of(site, y_TE).codecs[0], (self.pp.rank, self.pp.world_size)
        steps = broadcast_steps(
            None if x is None else x.reshape(y_TE.shape),
            y_TE,
            self._used(planned, y_TE),
            src,
            rank,
            num_stages,
            self._stats_of_stage(site),
        )
        copies = num_stages - 1 if rank == src else 0
        self._drive(steps, self.pp, site, len(y_TE), dtype, lambda: _copies(planned, y_TE.shape, copies))
        return y_TE.view(*shape)

    def _used(self, planned: Codec, x: Tensor) -> Codec:
        return CastCodec(dtype=x.dtype) if self._count_only else planned

    def _stats(self, site: str) -> Tensor:
        return self._codecs.counters(site).stats

    def _stats_of_stage(self, site: str) -> Tensor | None:
        """The ranks of a stage all send the same hidden states: what is clipped in them counts once."""
        return self._stats(site) if self._tp is None or self._tp.rank == 0 else None

    def _drive(
        self,
        steps: Steps,
        transport: Transport,
        site: str,
        num_tokens: int,
        dtype: torch.dtype,
        planned: Callable[[], Traffic],
        pair: tuple[int, int] | None = None,
        transform: Transform | None = None,
    ) -> Tensor:
        """Run the steps; count what they send, or, if only counting, what was planned."""
        counters = self._codecs.counters(site)
        if self._count_only:
            counters.count(num_tokens, planned(), dtype.itemsize)
            return Pending(steps, transport, pair=pair).wait()
        counters.num_tokens += num_tokens

        def sent(traffic: Traffic) -> None:
            counters.count_sent(_of_features(traffic, transform), dtype.itemsize)

        return Pending(steps, transport, sent, pair=pair).wait()


def traffic_of(
    choice: Choice,
    stages: Stages,
    num_tokens: int,
    num_features: int,
    rank: int,
    world_size: int,
    transform: Transform | None,
) -> Traffic:
    """What `rank` sends of a sum, with `transform` as components.

    A native one counts as what is optimal, 2 (R - 1) / R of the values.
    """
    if choice.form == "native":
        num_values = 2 * (world_size - 1) * num_tokens * num_features // world_size
        return Traffic(stages.codecs[0].row_nbytes(1) * num_values, num_values)
    num_sent = num_features if transform is None else transform.num_components
    found = named(choice.algorithm).sent(stages, num_tokens, num_sent, rank, world_size)
    assert found is not None, "only algorithms that can run are chosen"
    return _of_features(found, transform)


def _of_features(traffic: Traffic, transform: Transform | None) -> Traffic:
    """Components count as the features that they stand for."""
    if transform is None:
        return traffic
    return traffic._replace(num_values=traffic.num_values * transform.num_features // transform.num_components)


def _copies(codec: Codec, shape: torch.Size, copies: int) -> Traffic:
    return Traffic(copies * codec.payload_nbytes(*shape), copies * math.prod(shape))


def _block(num_features: Sequence[int], rank: int) -> slice:
    start = sum(num_features[:rank])
    return slice(start, start + num_features[rank])
