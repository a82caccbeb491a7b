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
from narrowcast.codecs import Codec, FittedRecipe, TransformCodec, TransformRecipe, trellis
from narrowcast.codecs.allocation import AS_BF16, BLOCK, UNIT_NBYTES, Entry, allocate, in_blocks
from narrowcast.codecs.fitted import fitted
from narrowcast.collectives import named
from narrowcast.errors import InvalidInputError
from narrowcast.plan.chains import Chains

ROUNDS = 3  # of bits handed out, each knowing what the last one's widths pass on
RIDGE = 1e-6  # of the mean sensitivity, added to all: directions that the text says nothing about


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The way from a site's values to components and back: analysis [A, N, K, B], synthesis [A, N, B, K], in BF16.

    A is 1 or R, and N * B features are cut into N blocks. None where features are the components. In the dtype of
    plans, as those of all sites are there at once: bits are handed out to all together.

    `power`: mean squares of the components, [R, K] or, of the sum, [1, K]; `sensitivity`: what an error in them costs.
    """

    analysis: Tensor | None
    synthesis: Tensor | None
    power: Tensor
    sensitivity: Tensor

    @property
    def feeds_back(self) -> bool:
        """As `TransformCodec.feeds_back` has it."""
        return self.analysis is None or len(self.analysis) == 1

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
) -> dict[str, tuple[Codec, ...]]:
    """Codecs by hop of all sites whose payloads take `bits` a value at most on average, where that can be met.

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
    given = hops
    for _ in range(ROUNDS):
        axes = [each for both in hops.values() for each in both]
        counted = [Entry(each.energy, counted=recoded or place % 2 == 0) for place, each in enumerate(axes)]
        allocated = allocate(counted, nbytes)
        widths = dict(zip(hops, zip(allocated[::2], allocated[1::2], strict=True), strict=True))
        fitted_to, hops = hops, _passed_on(given, hops, widths, chains)
        if hops is given:
            break
    return {
        site: tuple(_codec(moments[site].total.shape[1], *each) for each in zip(axes, widths[site], strict=True))
        for site, axes in fitted_to.items()
    }


def _passed_on(given: Hops, hops: Hops, widths: Mapping[str, Sequence[Tensor]], chains: Chains) -> Hops:
    """The given axes with sensitivities that know what becomes of an error where these widths are at work.

    The next site codes it, too, and loses again what its widths leave of it: that share of it costs there what an error
    of that site costs. (Not counted where components travel, which are others at each site.) And of the errors of R
    ranks, each has made its own good for itself.
    """
    found = dict(given)
    for chain in chains.chains:
        then = None
        for site in reversed([each for each in chain if each in given]):
            partial, total = given[site]
            if site in chains.read and partial.feeds_back:
                partial = replace(partial, sensitivity=partial.sensitivity * (1 - 1 / len(partial.power)))
            if then is not None and partial.analysis is None:
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
        again = fisher if moments.fisher_again is None else moments.fisher_again.double()
        return _along(seen, fisher), _along(summed, again)
    pooled = seen.sum(dim=0, keepdim=True) + (summed if recoded else 0)
    size = recipe.block_size if recipe.axes == "blocks" else len(fisher)
    analysis, synthesis = _axes_of(_diagonal_blocks(pooled, size), _diagonal_blocks(fisher[None], size)[0])
    return _powers(seen, fisher, analysis, synthesis), _powers(summed, fisher, analysis, synthesis)


def _diagonal_blocks(matrix_AEE: Tensor, size: int) -> Tensor:
    """Blocks [A, N, B, B] along the diagonals, of which zeros fill the last one."""
    missing = -matrix_AEE.shape[1] % size
    padded = torch.nn.functional.pad(matrix_AEE, (0, missing, 0, missing))
    return torch.stack([padded[:, own : own + size, own : own + size] for own in range(0, padded.shape[1], size)], 1)


def _along(covariance_REE: Tensor, fisher: Tensor) -> Axes:
    """The axes of each source's own."""
    return _powers(covariance_REE, fisher, *_axes_of(covariance_REE[:, None], fisher[None]))


def _axes_of(covariance_ANBB: Tensor, fisher_NBB: Tensor) -> tuple[Tensor, Tensor]:
    """Analysis and synthesis along the principal axes of what the loss minds: root C root, by falling energy.

    Rounded to what a plan holds: a component of hardly any power gets some of the others' by that, which its scale
    must cover.
    """
    mean = fisher_NBB.diagonal(dim1=1, dim2=2).mean()
    ridge = RIDGE * mean.clamp(min=torch.finfo(torch.float32).tiny)
    values, vectors = torch.linalg.eigh(fisher_NBB)
    roots = values.clamp(min=ridge).sqrt()[:, None]
    root, inverse = vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
    axes = torch.linalg.eigh(root @ covariance_ANBB @ root).eigenvectors.flip(-1)
    return (axes.mT @ root).bfloat16(), (inverse @ axes).bfloat16()


def _powers(covariance_REE: Tensor, fisher: Tensor, analysis: Tensor, synthesis: Tensor) -> Axes:
    size = analysis.shape[-1]
    seen, minded = _diagonal_blocks(covariance_REE, size), _diagonal_blocks(fisher[None], size)
    wide_analysis, wide_synthesis = analysis.double(), synthesis.double()
    power = ((wide_analysis @ seen) * wide_analysis).sum(dim=-1).clamp(min=0).flatten(1)
    sensitivity = ((minded @ wide_synthesis) * wide_synthesis).sum(dim=-2).clamp(min=0).flatten(1)
    return Axes(analysis=analysis, synthesis=synthesis, power=power, sensitivity=sensitivity.expand_as(power))


def _codec(num_features: int, axes: Axes, widths_RN: Tensor) -> Codec:
    """The codec of features, or of components along the axes; those that no source sends are not made."""
    if axes.analysis is None or axes.synthesis is None:
        return fitted(axes.power.sqrt(), widths_RN, axes.energy)
    kept_RK = torch.arange(axes.power.shape[1]).expand_as(axes.power)
    analysis, synthesis = axes.analysis, axes.synthesis
    if analysis.shape[1] == 1:  # of blocks all are made
        kept_RK = _kept(axes.energy, widths_RN, own=len(analysis) > 1)
        of_axes = list(enumerate(kept_RK[: len(analysis)]))
        analysis = torch.stack([axes.analysis[number][:, own] for number, own in of_axes])
        synthesis = torch.stack([axes.synthesis[number][:, :, own] for number, own in of_axes])
    power, energy = axes.power.gather(1, kept_RK), axes.energy.gather(1, kept_RK)
    widths_RN = widths_RN[:, : -(-power.shape[1] // BLOCK)].contiguous()
    return TransformCodec(
        size=num_features,
        analysis=analysis.clone(),  # a file holds no tensor twice, and both hops may have these axes
        synthesis=synthesis.clone(),
        components=fitted(power.sqrt(), widths_RN, energy),
    )


def _kept(energy_RK: Tensor, widths_RN: Tensor, *, own: bool) -> Tensor:
    """Components that are made of features, by source: those that any source sends, or as many of its `own`.

    One at least: where nothing is worth a bit a component goes without, as a token of none would have no size.
    """
    order_RK = in_blocks(energy_RK)[0].long()
    width_RK = widths_RN.repeat_interleave(BLOCK, dim=1)[:, : energy_RK.shape[1]]
    if own:
        return order_RK[:, : max(1, int((width_RK > 0).sum(dim=1).max()))]
    sent_K = torch.zeros_like(width_RK).scatter(1, order_RK, width_RK).any(dim=0)
    found_K = sent_K.nonzero()[:, 0] if sent_K.any() else order_RK[0, :1]
    return found_K.expand(len(energy_RK), -1)
