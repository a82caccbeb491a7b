"""Second moments: how large partial sums and their sums are, and how much the loss minds an error in them.

What `allocated` codecs, transforms and rotations are fitted to. Moments are of features one by one, or, `full`, of all
pairs of them.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from narrowcast.calibration.observers import first_counted
from narrowcast.engines import engine_of
from narrowcast.plan.fingerprint import in_order
from narrowcast.transport import transports_of

MomentsNeeded = Literal["none", "diagonal", "full"]

ROOM = 0.3  # for what is not known yet of values (decision 0032)
LABEL_SEED = 241107942  # of the labels that are drawn for the Fisher information


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of one site, over tokens, in fp32: E[x x^T] as [.., E, E] where full, otherwise its diagonal [.., E].

    `partial`: of what each rank puts in, [R, E(, E)]. `total`: of the sum, [1, E(, E)]. `fisher`: of the gradient of
    the loss in the sum, [E(, E)], whose labels are drawn from the model: its Fisher information (Amari 1998); or what
    stands for it, `sensitivity.sensitivities`. `fisher_again`: for what the sum loses where it travels again, None if
    that costs no less.
    """

    partial: Tensor
    total: Tensor
    fisher: Tensor
    fisher_again: Tensor | None = None

    def diagonal(self) -> "Moments":
        """The diagonals alone."""
        if self.fisher.ndim == 1:
            return self
        partial, total, fisher = (each.diagonal(dim1=-2, dim2=-1) for each in (self.partial, self.total, self.fisher))
        return Moments(partial=partial, total=total, fisher=fisher)


Means = tuple[Tensor, Tensor]  # of moments: of partial sums, and of their sum


class MomentObserver:
    """Sums of moments of partial sums, or where there are `groups` of the sums of these nodes, and of their sum.

    The first `num_left_out` tokens of a sequence do not count.
    """

    def __init__(self, groups: Sequence[Sequence[int]] = (), *, full: bool = False, num_left_out: int = 0) -> None:
        self.full, self._groups, self._num_left_out = full, groups, num_left_out
        self._moments: dict[str, list[Tensor]] = {}
        self._num_tokens: dict[str, int] = {}

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        """Look at partial sums and their sum."""
        parts = torch.stack([x.flatten(0, -2) for x in partials]).float()
        if self._groups:
            parts = torch.stack([parts[list(group)].sum(dim=0) for group in self._groups])
        first = first_counted(self._num_left_out, parts.shape[1])
        hops = parts[:, first:], total.flatten(0, -2)[None, first:].float()
        new = [second_moment(x_RTE, full=self.full) for x_RTE in hops]
        old = self._moments.get(site)
        self._moments[site] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        self._num_tokens[site] = self._num_tokens.get(site, 0) + hops[0].shape[1]

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None:
        """Nothing is fitted to columns."""

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None:
        """Nothing is fitted to what travels once."""

    def means(self) -> dict[str, Means]:
        """Means over tokens by site, of partial sums, and of their sum, in place of the sums: to be asked for once."""
        return {
            site: (partial.div_(self._num_tokens[site]), total.div_(self._num_tokens[site]))
            for site, (partial, total) in self._moments.items()
        }


def of_all_stages(model: nn.Module, means: Mapping[str, Means]) -> dict[str, Means]:
    """Means of the sums of all pipeline stages, on every rank."""
    pp = transports_of(engine_of(model).groups(model))[1]
    if pp is None:
        return dict(in_order(means))
    tensors = {f"{site}/{hop}": mean for site, hops in means.items() for hop, mean in enumerate(hops)}
    texts = pp.share(base64.b85encode(safetensors.torch.save(tensors)).decode(), "sharing moments")
    stages = [safetensors.torch.load(base64.b85decode(text)) for text in texts]
    found = {name: mean for stage in stages for name, mean in stage.items()}
    sites = {name.removesuffix("/0"): None for name in found if name.endswith("/0")}
    return {site: (found[f"{site}/0"], found[f"{site}/1"]) for site, _ in in_order(sites)}


def with_room(moment_REE: Tensor) -> Tensor:
    """Second moments with `ROOM` more of the mean power in every direction."""
    mean_R = moment_REE.diagonal(dim1=1, dim2=2).mean(dim=1)
    return moment_REE + ROOM * torch.diag_embed(mean_R[:, None].expand(moment_REE.shape[:2]))


def second_moment(x_RTE: Tensor, *, full: bool) -> Tensor:
    """Sums over tokens of x x^T [R, E, E], or of its diagonal [R, E]."""
    return torch.einsum("rte,rtf->ref", x_RTE, x_RTE) if full else x_RTE.square().sum(dim=1)


def fisher_information(
    model: nn.Module,
    sequences: Iterable[Tensor],
    sites: Iterable[str],
) -> dict[str, Tensor]:
    """Mean over tokens of g g^T, g being the gradient of the loss in what module `site` gives, fp32 [E, E].

    `model`: a whole one, with its own forwards. `sequences`: token ids [T] each. Labels are drawn from the model's own
    predictions, so that this is the Fisher information and not that of the text. Weights get no gradients.
    """
    held: dict[str, Tensor] = {}

    def hold(site: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: object, y: Tensor) -> Tensor:
            y = y if y.requires_grad else y.detach().requires_grad_()
            y.retain_grad()
            held[site] = y
            return y

        return hook

    names = list(sites)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    hooks = [model.get_submodule(site).register_forward_hook(hold(site)) for site in names]
    sums: dict[str, Tensor] = {}
    num_tokens, generator = 0, torch.Generator().manual_seed(LABEL_SEED)
    try:
        model.requires_grad_(False)
        for ids in sequences:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has switched off
                logits = model(input_ids=ids[None].clone(), use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator)
                torch.nn.functional.cross_entropy(logits, labels[:, 0].to(logits.device), reduction="sum").backward()
            for site in names:
                gradient = held[site].grad
                assert gradient is not None, "every site's output is on the way to the logits"
                new = second_moment(gradient.flatten(0, -2)[None].float(), full=True)[0]
                sums[site] = sums[site] + new if site in sums else new
            num_tokens += len(ids)
    finally:
        for each in hooks:
            each.remove()
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
    return {site: total / num_tokens for site, total in sums.items()}
