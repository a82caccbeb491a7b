"""Finding by trial which sums go into the residual stream as they are, and in which order.

A run on a few tokens notes every sum. A second run returns the same sums whatever they are computed from, and disturbs
one site in each of its sequences. Nothing can answer a disturbance then but what stands between a sum and the stream's
end. Sums that reach it alike end in the same answer to the same disturbance, and those behind a gate, say, in answers
of their own: what one site loses can be made good at any other that reaches the stream alike. A norm is seen by
doubling the sum, which it takes back.

Shapes: N sites, D disturbances, V entries of the vocabulary.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from narrowcast.calibration.observing import ObservedWires, over_wires
from narrowcast.calibration.readers import Watch
from narrowcast.engines import engine_of
from narrowcast.errors import InvalidInputError
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Split
from narrowcast.transport import transports_of

NUM_TRIED = 4  # tokens
SIZES = 1.0, 0.25  # of disturbances, in the root mean square of all sums together, which is about the stream's
# Of the change of logits that a disturbance makes: for sums that reach the stream alike these changes differ by 0.005
# to 0.05 of it in BF16, for others by 0.1 to 1.
TOLERANCE = 0.1
# Doubling a sum that goes into the stream changes logits about as much as noise of its size does, by 0.3 to 4 times
# that; behind a norm, by 0.01 of it.
LEAST_OF_DOUBLING = 0.1

NUM_DISTURBANCES = len(SIZES) + 2

BEHIND = "its sum does not reach the residual stream as most do: a norm, a gate or another layer stands in between"
REPEATED = "it runs more than once in a forward"
NO_READER = "no norm reads the stream between two sums and passes it on to what each rank computes for itself"
BOUNDARY = "boundary"


class Trial(ObservedWires):
    """Wires that note what travels in a first run, and in a second one give the same again, or disturb it."""

    def __init__(self, kinds: Mapping[str, str], tp_size: int) -> None:
        super().__init__((), tp_size)
        self._kinds = kinds
        self.noted: dict[str, Tensor] = {}  # [T, E]
        self._disturbed: Sequence[str] | None = None
        self._size = 0.0
        self.order: list[str] = []  # of sums, and of boundaries between stages
        self.added: list[str] = []  # sums, and what experts elsewhere made of tokens, as they come

    @property
    def sums(self) -> set[str]:
        """The sites of sums that were seen."""
        return {site for site in self.order if self._kinds[site] == "sum"}

    def power(self, site: str) -> float:
        """Mean square of a site's sum."""
        return self.noted[site].float().square().mean().item()

    def disturb(self, power: Mapping[str, float]) -> None:
        """From now on disturb one of these sites in each sequence but the first, and let nothing else be new.

        `power`: mean squares of the sums, which say how large disturbances are.
        """
        self._disturbed, self._size = list(power), sum(power.values()) ** 0.5

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        total = super().sum(partials, site)
        if self._kinds.get(site) != "sum":
            return total
        if self._disturbed is None:
            self.order.append(site)
            self.added.append(site)
        return self._same(total, site)

    def gather_features(self, parts: Sequence[Tensor], site: str) -> Tensor:
        gathered = super().gather_features(parts, site)
        return self._same(gathered, site) if self._kinds.get(site) == "gather" else gathered

    def gather_tokens(self, parts: Sequence[Tensor], site: str, num_tokens: Sequence[int]) -> Tensor:
        if self._disturbed is None:
            self.added.append(site)
        return self._same(torch.cat(list(parts)), site)

    def move(self, x: Tensor, site: str, copies: int) -> Tensor:
        if self._disturbed is None and self._kinds.get(site) == BOUNDARY:
            self.order.append(site)
        return x

    def _same(self, x: Tensor, site: str) -> Tensor:
        """The value that travelled in the first run, for every sequence."""
        if self._disturbed is None:
            self.noted[site] = x.reshape(-1, x.shape[-1])
            return x
        noted_TE = self.noted[site]
        again = noted_TE.repeat(1 + NUM_DISTURBANCES * len(self._disturbed), 1, 1)
        if site in self._disturbed:
            first = 1 + NUM_DISTURBANCES * self._disturbed.index(site)
            for place, disturbance_TE in enumerate(self._disturbances(noted_TE), first):
                again[place] += disturbance_TE
        return again.view(x.shape)

    def _disturbances(self, noted_TE: Tensor) -> list[Tensor]:
        """The same for all sites in several sizes, then noise of this one's own size, and its own sum again."""
        own_size = noted_TE.float().square().mean(dim=1, keepdim=True).sqrt()
        noise_TE = torch.randn(noted_TE.shape, generator=torch.Generator().manual_seed(0)).to(noted_TE.device)
        noises = *(size * self._size * noise_TE for size in SIZES), own_size * noise_TE
        return [*(noise.to(noted_TE.dtype) for noise in noises), noted_TE]


def chains_of(model: nn.Module, split: Split, ids: Tensor) -> Chains:
    """The sums of `model`, split by `split`, that can leave what they lose to the next one; tried on tokens `ids` [T].

    Every rank of a split model calls this.
    """
    engine = engine_of(model)
    trial = Trial(engine.sites(model, split), split.tp_size)
    watch = Watch(engine.computing_shares(model, split), trial.added)
    with over_wires(trial, model, split):
        with watch.over(model):
            _logits(model, ids[None, :NUM_TRIED])
        own = [site for site in dict.fromkeys(trial.order) if trial.order.count(site) == 1 and site in trial.sums]
        power = _of_all_stages(model, {site: trial.power(site) for site in own})
        trial.disturb(power)
        plain_V, *disturbed = _logits(model, ids[None, :NUM_TRIED].repeat(1 + NUM_DISTURBANCES * len(power), 1))
    moved_NDV = (torch.stack(disturbed) - plain_V).unflatten(0, (len(power), -1)) if disturbed else plain_V[:0]
    alike = {site for site, same in zip(power, _alike(moved_NDV), strict=True) if same}
    refused = {site: BEHIND if site in own else REPEATED for site in trial.sums if site not in alike}
    chains: list[tuple[str, ...]] = []
    chain: list[str] = []
    for site in [*trial.order, BOUNDARY]:
        if site in alike:
            chain.append(site)
        elif site not in trial.sums:
            chains, chain = [*chains, tuple(chain)], []
    chains = [chain for chain in chains if len(chain) > 1]
    readers = watch.readers(trial.noted, chains)
    found = _joined(
        model, Chains(chains=tuple(chains), refused=refused, readers=readers, unread=_refusal(model, split))
    )
    return replace(found, unread=NO_READER) if found.chains and not found.readers and not found.unread else found


def _joined(model: nn.Module, own: Chains) -> Chains:
    """The chains of all pipeline stages."""
    pp = transports_of(engine_of(model).groups(model))[1]
    stages = [json.dumps(own.to_json())] if pp is None else pp.share(json.dumps(own.to_json()), "joining chains")
    return functools.reduce(Chains.joined, (Chains.from_json(json.loads(text)) for text in stages))


def _refusal(model: nn.Module, split: Split) -> str:
    """The reason why no rank can make its own loss good for itself, if there is one."""
    try:
        engine_of(model).check_shares(model, split)
    except InvalidInputError as error:
        return str(error)
    return ""


def _of_all_stages(model: nn.Module, power: Mapping[str, float]) -> dict[str, float]:
    pp = transports_of(engine_of(model).groups(model))[1]
    stages = [power] if pp is None else map(json.loads, pp.share(json.dumps(power), "trying sums"))
    return {site: each for stage in stages for site, each in stage.items()}


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=ids_BT, use_cache=False)
    logits: Tensor = getattr(output, "logits", output)
    return logits[:, -1].double()


def _alike(moved_NDV: Tensor) -> list[bool]:
    """True for each site whose disturbances end as they do at most sites, and whose sum is not taken back."""
    if len(moved_NDV) < 2 or not moved_NDV.isfinite().all():
        return [False] * len(moved_NDV)
    near_NN = torch.stack([_near(moved_NV) for moved_NV in moved_NDV[:, : len(SIZES)].unbind(1)]).all(dim=0)
    by_noise_N, by_doubling_N = moved_NDV[:, len(SIZES) :].norm(dim=-1).unbind(1)
    near_NN &= by_doubling_N >= LEAST_OF_DOUBLING * by_noise_N
    found_N = near_NN[near_NN.sum(dim=1).argmax()]
    return (found_N & (found_N.sum() > 1)).tolist()


def _near(moved_NV: Tensor) -> Tensor:
    """Pairs [N, N] that differ by less than the tolerance, of the larger one."""
    size_N = moved_NV.norm(dim=1)
    return torch.cdist(moved_NV, moved_NV) <= TOLERANCE * torch.maximum(size_N[:, None], size_N)
