"""What the ranks of a split model send each other, in one process: equal bits, and bytes as they would be counted."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from narrowcast.codecs import Codec
from narrowcast.collectives import simulate
from narrowcast.collectives.base import Traffic
from narrowcast.plan.decisions import Choice
from narrowcast.runtime.communicator import SiteCodecs, plain, traffic_of


class Simulator:
    """The values of all ranks travel over this. Bytes are those of rank 0 (of a stage), clipping is counted for all."""

    def __init__(self, codecs: SiteCodecs, *, count_only: bool = False) -> None:
        self._codecs, self._count_only = codecs, count_only

    def all_reduce_linear(self, inputs: Sequence[Tensor], weights: Sequence[Tensor], site: str) -> Tensor:
        """Sum the products of all ranks: `inputs` [..., F] of each with its `weights` [E, F]."""
        choice = self._choice(site, inputs[0].shape[:-1], len(weights[0]), len(inputs))
        transform = self._codecs.transform(site, choice)
        if transform is None or self._count_only:
            products = [functional.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
            return self._sum(products, site, choice)
        components = [
            transform.placed(functional.linear(x, self._codecs.folded(site, weight, rank)), rank)
            for rank, (x, weight) in enumerate(zip(inputs, weights, strict=True))
        ]
        return transform.synthesize(self._sum(components, site, choice), remixed=choice.algorithm == "two_shot")

    def all_reduce(self, partials: Sequence[Tensor], site: str) -> Tensor:
        """Sum the partial sums [..., E] of all ranks."""
        choice = self._choice(site, partials[0].shape[:-1], partials[0].shape[-1], len(partials))
        transform = self._codecs.transform(site, choice)
        if transform is None or self._count_only:
            return self._sum(partials, site, choice)
        components = [transform.analyze(x, rank).to(x.dtype) for rank, x in enumerate(partials)]
        return transform.synthesize(self._sum(components, site, choice), remixed=choice.algorithm == "two_shot")

    def _choice(self, site: str, shape: Sequence[int], num_features: int, world_size: int) -> Choice:
        return self._codecs.choice(site, math.prod(shape), num_features, world_size)

    def _sum(self, partials: Sequence[Tensor], site: str, choice: Choice) -> Tensor:
        """The sum of partial sums, or of the components that stand for them."""
        x, transform = partials[0], self._codecs.transform(site, choice)
        num_tokens = math.prod(x.shape[:-1])
        num_features = x.shape[-1] if transform is None else transform.num_features
        planned = self._codecs.of(site, x) if choice.form == "coded" else plain(x.dtype)
        traffic = traffic_of(choice, planned, num_tokens, num_features, 0, len(partials), transform)
        stats = self._count(site, x, num_tokens, traffic)
        # A native sum has no twin: the order of its additions is the library's. A plain one stands for it.
        stages, algorithm = (plain(x.dtype), "auto") if self._count_only else (planned, choice.algorithm or "auto")
        return simulate.all_reduce(
            partials, codec=stages.codecs, groups=stages.groups, mix=stages.mix, algorithm=algorithm, stats=stats
        )

    def all_gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        """Put the last dimensions of all ranks side by side."""
        x, peers = parts[0], len(parts) - 1
        planned, num_tokens = self._codecs.of(site, x).codecs[0], math.prod(x.shape[:-1])
        nbytes = planned.part(0, x.shape[-1]).payload_nbytes(num_tokens, x.shape[-1])
        stats = self._count(site, x, num_tokens, Traffic(peers * nbytes, peers * x.numel()))
        codec = plain(x.dtype).codecs[0] if self._count_only else planned
        flat = [part.reshape(num_tokens, part.shape[-1]) for part in parts]
        return simulate.all_gather_features(flat, codec=codec, stats=stats).view(*x.shape[:-1], -1)

    def move(self, x: Tensor, site: str, num_sent: int) -> Tensor:
        """`x` [..., E] as another rank receives it; rank 0 sends `num_sent` tokens in all."""
        planned, num_features = self._codecs.of(site, x).codecs[0], x.shape[-1]
        traffic = Traffic(planned.payload_nbytes(num_sent, num_features), num_sent * num_features)
        stats = self._count(site, x, math.prod(x.shape[:-1]), traffic)
        return self._sent(x, planned, stats)

    def all_to_all(self, x_PE: Tensor, site: str, num_sent: int) -> Tensor:
        """The same for pairs of a token and an expert, which do not count as tokens."""
        planned, num_features = self._codecs.of(site, x_PE).codecs[0], x_PE.shape[1]
        traffic = Traffic(planned.payload_nbytes(num_sent, num_features), num_sent * num_features)
        return self._sent(x_PE, planned, self._count(site, x_PE, 0, traffic))

    def _sent(self, x: Tensor, planned: Codec, stats: Tensor) -> Tensor:
        if self._count_only:
            return x
        return simulate.send(x.reshape(-1, x.shape[-1]), src=0, world_size=1, codec=planned, stats=stats).view(x.shape)

    def _count(self, site: str, x: Tensor, num_tokens: int, traffic: Traffic) -> Tensor:
        counters = self._codecs.counters(site)
        counters.count(num_tokens, traffic, x.dtype.itemsize)
        return counters.stats
