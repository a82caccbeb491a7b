"""Fitting `allocated` codecs, and the axes along which they code, to the moments of all sites of a model at once.

To second order, an error e in what a site gives costs the loss e^T H e / 2, H being the Fisher information there. Along
axes whose components are independent and whose errors do not add up in the loss, that is a sum over components of
variance times sensitivity times what a quantizer leaves of the variance: what `allocate` hands bits out by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from narrowcast.calibration.moments import Moments
from narrowcast.codecs import AllocatedCodec, Codec, FittedRecipe, TransformRecipe, trellis
from narrowcast.codecs.allocation import AS_BF16, BLOCK, UNIT_NBYTES, Entry, allocate, in_blocks
from narrowcast.codecs.fitted import fitted
from narrowcast.collectives import named
from narrowcast.errors import InvalidInputError
from narrowcast.plan.chains import Chains
from narrowcast.plan.transform import Part, Remix, Transform

ROUNDS = 3  # of bits handed out, each knowing what the last one's widths pass on
RIDGE = 1e-6  # of the mean sensitivity, added to all: directions that the text says nothing about


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A site's codecs by hop, and the transform into the components that they code."""

    codecs: tuple[Codec, ...]
    transform: Transform | None


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The way from a site's values to components and back: analysis [A, K, E], synthesis [A, E, K], A being 1 or R.

    `power`: mean squares of the components, [R, K] or, of the sum, [1, K]; `sensitivity`: what an error in them costs.
    """

    analysis: Tensor | None
    synthesis: Tensor | None
    power: Tensor
    sensitivity: Tensor

    @property
    def energy(self) -> Tensor:
        """The cost of sending nothing of each component."""
        return self.power * self.sensitivity


Hops = Mapping[str, tuple[Axes, Axes]]  # of what the ranks put in and of their sum, by site


def least_bits(num_features: int) -> float:
    """Bits a value of a scale, and of one bit for each feature of a block."""
    return 8 * (1 + UNIT_NBYTES) / num_features


def fit(
    moments: Mapping[str, Moments],
    recipe: FittedRecipe,
    *,
    bits: float,
    algorithm: str,
    chains: Chains = Chains(),
) -> dict[str, Fitted]:
    """Codecs and transforms of all sites whose payloads take `bits` a value at most on average, where that can be met.

    `algorithm`: the one whose payloads count: those of the ranks, and of the sum too where it travels again. What does
    not count gets bits down to the same worth of a bit. `chains`: sites that leave what they lose to the next one.
    InvalidInputError for too few bits.
    """
    least = max(least_bits(each.partial.shape[1]) for each in moments.values())
    if bits < least:
        raise InvalidInputError(
            "bits",
            expected=f"{least:.2g} a value or more: a scale, and a bit for each of 32 features",
            found=bits,
            remedy="Ask for more.",
        )
    recoded = named(algorithm).recodes
    hops: Hops = {site: hop_axes(each, recipe, recoded=recoded) for site, each in moments.items()}
    nbytes = sum((1 + recoded) * (bits * each.partial.shape[1] / 8 - 1) for each in moments.values())
    if isinstance(recipe, TransformRecipe):  # whose components feed nothing back
        chains = Chains()
    given = hops
    for _ in range(ROUNDS):
        axes = [each for both in hops.values() for each in both]
        counted = [Entry(each.energy, counted=recoded or place % 2 == 0) for place, each in enumerate(axes)]
        allocated = allocate(counted, nbytes)
        widths = dict(zip(hops, zip(allocated[::2], allocated[1::2], strict=True), strict=True))
        fitted_to, hops = hops, _passed_on(given, hops, widths, chains)
        if hops is given:
            break
    return {site: _fitted(recipe, *axes, *widths[site]) for site, axes in fitted_to.items()}


def _passed_on(given: Hops, hops: Hops, widths: Mapping[str, Sequence[Tensor]], chains: Chains) -> Hops:
    """The given axes with sensitivities that know what becomes of an error where these widths are at work.

    The next site codes it, too, and loses again what its widths leave of it: that share of it costs there what an error
    of that site costs. And of the errors of R ranks, each has made its own good for itself.
    """
    found = dict(given)
    for chain in chains.chains:
        then = None
        for site in reversed([each for each in chain if each in given]):
            partial, total = given[site]
            if site in chains.read:
                partial = replace(partial, sensitivity=partial.sensitivity * (1 - 1 / len(partial.power)))
            if then is not None:
                partial, total = (
                    replace(own, sensitivity=own.sensitivity + _left(seen, width_RN) * later.sensitivity)
                    for own, later, seen, width_RN in zip(
                        (partial, total), found[then], hops[then], widths[then], strict=True
                    )
                )
            found[site], then = (partial, total), site
    return found if chains.chains else given


def _left(axes: Axes, widths_RN: Tensor) -> Tensor:
    """The share of its power that coding each feature in so many bits leaves, [R, E]."""
    order_RE, _ = in_blocks(axes.energy)
    shares = torch.tensor([*trellis.DISTORTION, *[0.0] * (AS_BF16 - trellis.MAX_BITS)], dtype=axes.power.dtype)
    left_RE = shares[widths_RN.long()].repeat_interleave(BLOCK, dim=1)[:, : axes.power.shape[1]]
    return torch.zeros_like(left_RE).scatter(1, order_RE.long(), left_RE)


def hop_axes(moments: Moments, recipe: FittedRecipe, *, recoded: bool) -> tuple[Axes, Axes]:
    """Of what the ranks put in, and of their sum, which axes of a site also fit where it is `recoded`."""
    if not isinstance(recipe, TransformRecipe):
        own = moments.diagonal()
        partial, total = (
            Axes(analysis=None, synthesis=None, power=each, sensitivity=own.fisher.expand_as(each))
            for each in (own.partial, own.total)
        )
        return partial, total
    seen, summed, fisher = (each.double() for each in (moments.partial, moments.total, moments.fisher))
    if recipe.axes == "ranks":
        return _along(seen, fisher, *_axes_of(seen, fisher)), _along(summed, fisher, *_axes_of(summed, fisher))
    pooled = seen.sum(dim=0, keepdim=True) + (summed if recoded else 0)
    size = _block_size(recipe, len(fisher))
    places = [slice(start, start + size) for start in range(0, len(fisher), size)]
    blocks = [_axes_of(pooled[:, own, own], fisher[own, own]) for own in places]
    analysis, synthesis = (torch.block_diag(*(block[side][0] for block in blocks))[None] for side in (0, 1))
    return _along(seen, fisher, analysis, synthesis), _along(summed, fisher, analysis, synthesis)


def _block_size(recipe: TransformRecipe, num_features: int) -> int:
    return recipe.block_size if recipe.axes == "blocks" else num_features


def _axes_of(covariance_AEE: Tensor, fisher: Tensor) -> tuple[Tensor, Tensor]:
    """Analysis and synthesis along the principal axes of what the loss minds: root C root, by falling energy.

    Rounded to what a plan holds: a component of hardly any power gets some of the others' by that, which its scale
    must cover.
    """
    ridge = RIDGE * fisher.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    values, vectors = torch.linalg.eigh(fisher)
    roots = values.clamp(min=ridge).sqrt()
    root, inverse = vectors * roots @ vectors.T, vectors / roots @ vectors.T
    axes = torch.linalg.eigh(root @ covariance_AEE @ root).eigenvectors.flip(-1)
    return (axes.mT @ root).bfloat16().double(), (inverse @ axes).bfloat16().double()


def _along(covariance_REE: Tensor, fisher: Tensor, analysis: Tensor, synthesis: Tensor) -> Axes:
    power = ((analysis @ covariance_REE) * analysis).sum(dim=-1).clamp(min=0)
    sensitivity = ((fisher @ synthesis) * synthesis).sum(dim=-2).clamp(min=0)
    return Axes(analysis=analysis, synthesis=synthesis, power=power, sensitivity=sensitivity.expand_as(power))


def _fitted(recipe: FittedRecipe, partial: Axes, total: Axes, widths: Tensor, total_widths: Tensor) -> Fitted:
    if not isinstance(recipe, TransformRecipe):
        return _of_features(partial, total, widths, total_widths)
    if recipe.axes == "ranks":
        return _of_ranks(partial, total, widths, total_widths)
    return _of_site(partial, total, widths, total_widths, _block_size(recipe, partial.power.shape[1]))


def _of_features(partial: Axes, total: Axes, widths: Tensor, total_widths: Tensor) -> Fitted:
    codecs = tuple(
        fitted(axes.power.sqrt(), each, axes.energy) for axes, each in ((partial, widths), (total, total_widths))
    )
    return Fitted(codecs=codecs, transform=None)


def _of_site(partial: Axes, total: Axes, widths: Tensor, total_widths: Tensor, block_size: int) -> Fitted:
    """Components that no rank sends, nor their sum, are not made."""
    assert partial.analysis is not None and partial.synthesis is not None
    sent_K = _one_at_least(_sent(partial.energy, widths).any(dim=0) | _sent(total.energy, total_widths)[0])
    parts, kept = [], []
    for start in range(0, len(sent_K), block_size):
        own = slice(start, start + block_size)
        components = start + sent_K[own].nonzero()[:, 0]
        analysis, synthesis = partial.analysis[0][components, own], partial.synthesis[0][own][:, components]
        parts.append(_part(start, None, analysis, synthesis))
        kept.append(components)
    components = torch.cat(kept)
    codecs = tuple(_of_components(axes, each, components) for axes, each in ((partial, widths), (total, total_widths)))
    return Fitted(codecs=codecs, transform=Transform(num_features=len(sent_K), parts=tuple(parts)))


def _of_ranks(partial: Axes, total: Axes, widths: Tensor, total_widths: Tensor) -> Fitted:
    """Each rank's components stand beside those of the others; the sum travels again along axes of its own."""
    assert partial.analysis is not None and partial.synthesis is not None
    assert total.analysis is not None and total.synthesis is not None
    kept = [_one_at_least(mask).nonzero()[:, 0] for mask in _sent(partial.energy, widths)]
    parts = tuple(
        _part(0, rank, partial.analysis[rank][own], partial.synthesis[rank][:, own]) for rank, own in enumerate(kept)
    )
    power, energy = (
        torch.block_diag(*(of[rank][own][None] for rank, own in enumerate(kept)))
        for of in (partial.power, partial.energy)
    )
    num_blocks = -(-power.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(widths, (0, max(0, num_blocks - widths.shape[1])))[:, :num_blocks]
    reduced = _one_at_least(_sent(total.energy, total_widths)[0]).nonzero()[:, 0]
    synthesis = torch.cat([part.synthesis.double() for part in parts], dim=1)
    remix = Remix(
        mix=(total.analysis[0][reduced] @ synthesis).bfloat16(), synthesis=total.synthesis[0][:, reduced].bfloat16()
    )
    return Fitted(
        codecs=(fitted(power.sqrt(), padded, energy), _of_components(total, total_widths, reduced)),
        transform=Transform(num_features=partial.power.shape[1], parts=parts, remix=remix),
    )


def _sent(energy_RK: Tensor, widths_RN: Tensor) -> Tensor:
    """A mask of the components of each source that are sent, bool [R, K]."""
    order_RK, _ = in_blocks(energy_RK)
    width_RK = widths_RN.repeat_interleave(BLOCK, dim=1)[:, : energy_RK.shape[1]]
    return torch.zeros_like(width_RK).scatter(1, order_RK.long(), width_RK) > 0


def _one_at_least(sent_K: Tensor) -> Tensor:
    """The mask, or where nothing is worth a bit, a component without bits: a sum of none would have no size."""
    return sent_K if sent_K.any() else torch.arange(len(sent_K)) == 0


def _of_components(axes: Axes, widths_RN: Tensor, kept: Tensor) -> AllocatedCodec:
    """The codec of the components `kept`, among which are all that are sent."""
    num_blocks = -(-len(kept) // BLOCK)
    return fitted(axes.power[:, kept].sqrt(), widths_RN[:, :num_blocks].contiguous(), axes.energy[:, kept])


def _part(start: int, rank: int | None, analysis: Tensor, synthesis: Tensor) -> Part:
    return Part(start=start, rank=rank, analysis=analysis.bfloat16(), synthesis=synthesis.bfloat16())
