"""Fitting `allocated` codecs, and the axes along which they code, to the moments of all sites of a model at once.

To second order, an error e in what a site gives costs the loss e^T H e / 2, H being the Fisher information there. Along
axes whose components are independent and whose errors do not add up in the loss, that is a sum over components of
variance times sensitivity times what a quantizer leaves of the variance: what `allocate` hands bits out by.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from narrowcast.calibration.moments import Moments
from narrowcast.codecs import AllocatedCodec, Codec
from narrowcast.codecs.allocated_recipe import fitted
from narrowcast.codecs.allocation import BLOCK, UNIT_NBYTES, Entry, allocate, in_blocks
from narrowcast.errors import InvalidInputError
from narrowcast.plan.transform import Part, Remix, Transform

RIDGE = 1e-6  # of the mean sensitivity, added to all: directions that the text says nothing about

# Axes: those of the features; one set for all ranks of a site, over all features or within blocks of them; one set for
# each rank, whose partial sums span no more dimensions than it holds columns of the weights.
Form = Literal["features", "site", "blocks", "ranks"]
Budgeted = Literal["one_shot", "two_shot"]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A site's codecs by stage, and the transform into the components that they code."""

    codecs: tuple[Codec, ...]
    transform: Transform | None


@dataclass(frozen=True, kw_only=True)
class Axes:
    """How a site's values become components: analysis [A, K, E], synthesis [A, E, K], A being 1 or R.

    `power`: mean squares of the components, [R, K] or, of the sum, [1, K]; `energy`: the same times sensitivities.
    """

    analysis: Tensor | None
    synthesis: Tensor | None
    power: Tensor
    energy: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What to fit to a whole model: by `bits` a value, or by the KL divergence, in nats, that it may cost.

    `form`: along which axes; `block_size`: features that share axes in the form "blocks". `budgeted`: as in `fit`; None
    for the algorithm that sends fewer bytes, one_shot between two ranks and two_shot among more.
    """

    bits: float | None = None
    target_kl: float | None = None
    form: Form = "features"
    block_size: int = 64
    budgeted: Budgeted | None = None

    def __post_init__(self) -> None:
        known = self.form in get_args(Form) and self.budgeted in (None, *get_args(Budgeted)) and self.block_size > 0
        if not known or (self.bits is not None and self.target_kl is not None):
            raise InvalidInputError(
                "codec",
                expected=f"a form of {', '.join(get_args(Form))}, and either bits or a target KL",
                found=repr(self),
                remedy="Choose other values.",
            )
        for name, value in (("bits", self.bits), ("target KL", self.target_kl)):
            if value is not None and not 0 < value <= 16:
                raise InvalidInputError(name, expected="above 0, 16 at most", found=value, remedy="Choose another.")

    def budgeted_among(self, tp_size: int) -> Budgeted:
        """The algorithm whose payloads count among so many ranks."""
        return self.budgeted or ("one_shot" if tp_size == 2 else "two_shot")


MODEL_RECIPES = {"allocated": ModelRecipe(), "transform": ModelRecipe(form="ranks")}

DEFAULT_BITS = {"features": 3.0, "site": 2.0, "blocks": 2.0, "ranks": 1.5}


def least_bits(num_features: int) -> float:
    """Bits a value of a scale, and of one bit for each feature of a block."""
    return 8 * (1 + UNIT_NBYTES) / num_features


def fit(
    moments: Mapping[str, Moments], *, bits: float, form: Form, budgeted: Budgeted, block_size: int = 64
) -> dict[str, Fitted]:
    """Codecs and transforms of all sites whose payloads take `bits` a value at most on average, where that can be met.

    `budgeted`: the algorithm whose payloads count: for "one_shot" what the ranks put in, for "two_shot" that and the
    sum, which travels again. The other stage gets bits down to the same worth of a bit. InvalidInputError for too few.
    """
    least = max(least_bits(each.partial.shape[1]) for each in moments.values())
    if bits < least:
        raise InvalidInputError(
            "bits",
            expected=f"{least:.2g} a value or more: a scale, and a bit for each of 32 features",
            found=bits,
            remedy="Ask for more.",
        )
    sizes = {site: block_size if form == "blocks" else each.fisher.shape[0] for site, each in moments.items()}
    stages = {site: stage_axes(each, form, sizes[site], budgeted) for site, each in moments.items()}
    entries, nbytes = [], 0.0
    for site, (partial, total) in stages.items():
        entries += [Entry(partial.energy), Entry(total.energy, counted=budgeted == "two_shot")]
        nbytes += (2 if budgeted == "two_shot" else 1) * (bits * moments[site].partial.shape[1] / 8 - 1)
    widths = iter(allocate(entries, nbytes))
    assemble = {"features": _of_features, "ranks": _of_ranks}.get(form, _of_site)
    return {site: assemble(*axes, next(widths), next(widths), sizes[site]) for site, axes in stages.items()}


def stage_axes(moments: Moments, form: Form, block_size: int, budgeted: Budgeted) -> tuple[Axes, Axes]:
    """Of what the ranks put in, and of their sum."""
    if form == "features":
        own = moments.diagonal()
        partial, total = (
            Axes(analysis=None, synthesis=None, power=each, energy=each * own.fisher)
            for each in (own.partial, own.total)
        )
        return partial, total
    seen, summed, fisher = (each.double() for each in (moments.partial, moments.total, moments.fisher))
    if form == "ranks":
        return _along(seen, fisher, *_axes_of(seen, fisher)), _along(summed, fisher, *_axes_of(summed, fisher))
    pooled = seen.sum(dim=0, keepdim=True) + (summed if budgeted == "two_shot" else 0)
    places = [slice(start, start + block_size) for start in range(0, len(fisher), block_size)]
    blocks = [_axes_of(pooled[:, own, own], fisher[own, own]) for own in places]
    analysis, synthesis = (torch.block_diag(*(block[side][0] for block in blocks))[None] for side in (0, 1))
    return _along(seen, fisher, analysis, synthesis), _along(summed, fisher, analysis, synthesis)


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
    return Axes(analysis=analysis, synthesis=synthesis, power=power, energy=power * sensitivity)


def _of_features(partial: Axes, total: Axes, widths: Tensor, total_widths: Tensor, _: int) -> Fitted:
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


def _of_ranks(partial: Axes, total: Axes, widths: Tensor, total_widths: Tensor, _: int) -> Fitted:
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
    """Which components of each source are sent, bool [R, K]."""
    order_RK, _ = in_blocks(energy_RK)
    width_RK = widths_RN.repeat_interleave(BLOCK, dim=1)[:, : energy_RK.shape[1]]
    return torch.zeros_like(width_RK).scatter(1, order_RK.long(), width_RK) > 0


def _one_at_least(sent_K: Tensor) -> Tensor:
    """Where nothing is worth a bit, a component without bits: a sum of none would have no size."""
    return sent_K if sent_K.any() else torch.arange(len(sent_K)) == 0


def _of_components(axes: Axes, widths_RN: Tensor, kept: Tensor) -> AllocatedCodec:
    """The codec of the components `kept`, among which are all that are sent."""
    num_blocks = -(-len(kept) // BLOCK)
    return fitted(axes.power[:, kept].sqrt(), widths_RN[:, :num_blocks].contiguous(), axes.energy[:, kept])


def _part(start: int, rank: int | None, analysis: Tensor, synthesis: Tensor) -> Part:
    return Part(start=start, rank=rank, analysis=analysis.bfloat16(), synthesis=synthesis.bfloat16())
