"""Draws docs/method.png from the bundled model, and prints the figures that docs/method.md quotes.

usage: python docs/method_picture.py [docs/method.png]
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from narrowcast.calibration import Observations, observe
from narrowcast.calibration.moments import Moments
from narrowcast.calibration.text import sequences
from narrowcast.codecs import AllocatedRecipe, FittedRecipe, TransformRecipe, trellis
from narrowcast.codecs.allocation import AS_BF16, BLOCK, Entry, allocate, in_blocks
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.scores import log_probs

MODEL = Path(__file__).parents[1] / "models" / "gutenberg-7m"
TP_SIZE, BITS = 8, 1.5
NUM_CALIBRATION, NUM_SCORED = 64, 8
SITE = "model.layers.3.mlp.down_proj"
UNSEEN = 1e-5  # what rounding to BF16 makes of a dimension that a rank does not span is less
GRAY = "#6b7280"
Form = Literal["features", "site", "ranks"]
RECIPES: dict[Form, FittedRecipe] = {
    "features": AllocatedRecipe(),
    "site": TransformRecipe(axes="site"),
    "ranks": TransformRecipe(axes="ranks"),
}
COLOURS: dict[Form, str] = {"features": GRAY, "site": "#2563eb", "ranks": "#dc2626"}
LABELS = {"features": "features as they are", "site": "one set of axes for the site", "ranks": "each rank's own axes"}

Spectra = Mapping[Form, Mapping[str, Tensor]]  # energies [R, E] by form and site


def energies(moments: Moments, form: Form) -> Tensor:
    """Variance times sensitivity of each rank's components [R, E], falling; written anew, not as `fit` has it."""
    covariance_REE, fisher = moments.partial.double(), moments.fisher.double()
    if form == "features":
        found = covariance_REE.diagonal(dim1=1, dim2=2) * fisher.diagonal()
    else:
        values, vectors = torch.linalg.eigh(fisher)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        whitened_REE = root @ covariance_REE @ root
        axes = torch.linalg.eigh(whitened_REE.sum(dim=0) if form == "site" else whitened_REE).eigenvectors
        found = (axes.mT @ whitened_REE @ axes).diagonal(dim1=1, dim2=2)
    return found.clamp(min=0).sort(dim=1, descending=True).values


def shared_out(found: Mapping[str, Tensor], bits: float) -> tuple[dict[str, Tensor], float]:
    """Widths [R, N] by site at `bits` a value, and the energy from which on a component deserves a bit."""
    nbytes = len(found) * (bits * next(iter(found.values())).shape[1] / 8 - 1)
    widths = allocate([Entry(each) for each in found.values()], nbytes)
    distortion = torch.tensor(trellis.DISTORTION, dtype=torch.float64)
    gains = [in_blocks(each)[1][..., None] * -distortion.diff() for each in found.values()]
    worth = torch.cat([each.flatten(1).sort(dim=1, descending=True).values.sum(dim=0) for each in gains])
    least = worth.sort(descending=True).values[int(nbytes // (BLOCK // 8)) - 1].item()
    return dict(zip(found, widths, strict=True)), least / (BLOCK * TP_SIZE * float(1 - distortion[1]))


def expected_kl(found: Mapping[str, Tensor], widths: Mapping[str, Tensor]) -> float:
    """Half of what is left of all sites' energies, in nats."""
    distortion = torch.tensor([*trellis.DISTORTION, *[0.0] * (AS_BF16 - trellis.MAX_BITS)], dtype=torch.float64)
    left = (float((in_blocks(each)[1] * distortion[widths[site].long()]).sum()) for site, each in found.items())
    return sum(left) / 2


def print_check(seen: Observations, spectra: Spectra) -> None:
    """The KL divergence that is expected of plans for one_shot, and the one that they have."""
    batches = _text("scoring.txt", NUM_SCORED)
    reference = [log_probs(seen.model, ids) for ids in batches]
    for form, found in spectra.items():
        for bits in (1.0, 2.0, 3.0):
            plan = seen.plan({"sum": replace(RECIPES[form], bits=bits, algorithm="one_shot")})
            score = evaluate(seen.model, plan, batches, algorithm="one_shot", reference=reference).score
            expected = expected_kl(found, shared_out(found, bits)[0])
            print(f"{form}, {bits:g} bits: expected KL {expected:.5f}, measured {score.kl_nats:.5f}")


def print_axes(spectra: Spectra, kind: str) -> None:
    """Of sites of a kind: the bits a value that axes save at a high rate, and how many dimensions a rank spans."""
    features, site = (
        [each.log2().mean().item() / 2 for name, each in spectra[form].items() if name.endswith(kind)]
        for form in ("features", "site")
    )
    saved = [a - b for a, b in zip(features, site, strict=True)]
    left = [
        1 - each.cumsum(dim=1) / each.sum(dim=1, keepdim=True)
        for name, each in spectra["ranks"].items()
        if name.endswith(kind)
    ]
    most = max(int((each > UNSEEN).sum(dim=1).max()) + 1 for each in left)
    mean = sum(saved) / len(saved)
    print(f"{kind}: axes of a site save {mean:.2f} ({min(saved):.2f} to {max(saved):.2f}) bits a value")
    print(f"{kind}: all but {UNSEEN} of a rank's energy is in {most} of {left[0].shape[1]} dimensions")


def draw_spectra(axes: Sequence[plt.Axes], spectra: Spectra) -> None:
    """Energies of rank 0 and the level that they are cut at; below, the bits of blocks."""
    above, below = axes
    for form, found in spectra.items():
        widths, level = shared_out(found, BITS)
        colour, energy, bits = COLOURS[form], found[SITE][0], widths[SITE][0].tolist()
        above.plot(range(1, len(energy) + 1), energy, color=colour, linewidth=2, label=LABELS[form])
        above.axhline(level, color=colour, linewidth=1, linestyle=(0, (5, 3)))
        above.annotate("water level", (232, level), (0, 2), textcoords="offset points", fontsize=8, color=colour)
        below.stairs(bits, [BLOCK * place for place in range(len(bits) + 1)], color=colour, linewidth=2, baseline=None)
    above.set_yscale("log")
    above.set_ylabel("energy: variance x sensitivity, nats")
    above.set_title(f"{SITE}, rank 0 of {TP_SIZE}; all sites at {BITS:g} bits a value", fontsize=10)
    above.annotate("rounding to BF16", (128, 3e-11), (0, 8), textcoords="offset points", fontsize=8, color=GRAY)
    above.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 1))
    below.set_ylabel("bits")
    below.set_xlabel("components by falling energy, in blocks of 32")
    below.set_yticks([0, 2, 4, 6])
    below.set_xticks(range(0, BLOCK * len(bits) + 1, BLOCK))


def draw_distortion(axes: plt.Axes) -> None:
    """What quantizers of 1 to 8 bits leave of a normal value's variance, and what any code must."""
    bits, rates = range(1, trellis.MAX_BITS + 1), [0, trellis.MAX_BITS]
    axes.plot(bits, trellis.DISTORTION[1:], "o", color="#2563eb", label="the trellis, 1 to 8 bits")
    factor = math.sqrt(3) * math.pi / 2
    axes.plot(
        rates,
        [factor * 4.0**-rate for rate in rates],
        ":",
        color="#2563eb",
        label="2.72 x $2^{-2b}$, scalar, many bits",
    )
    axes.plot(rates, [4.0**-rate for rate in rates], color="#111827", label="Shannon's bound, $2^{-2b}$")
    axes.set_yscale("log")
    axes.set_xlabel("bits b")
    axes.set_ylabel("share of the variance that is lost")
    axes.set_title("a normal value in b bits", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _text(name: str, limit: int) -> list[Tensor]:
    return sequences(load_engine().load_tokenizer(MODEL), MODEL / name, length=256, limit=limit)


def main(path: Path) -> None:
    """Calibrate, print, draw."""
    torch.set_num_threads(1)  # the matrices are small: threads would wait for each other
    model = load_engine().load(MODEL)
    seen = observe(model, _text("calibration.txt", NUM_CALIBRATION), tp_size=TP_SIZE, moments="full")
    spectra = {form: {site: energies(each, form) for site, each in seen.moments.items()} for form in COLOURS}
    for kind in ("o_proj", "down_proj"):
        print_axes(spectra, kind)
    print_check(seen, spectra)
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.7, 1], height_ratios=[3, 1])
    above = figure.add_subplot(grid[0, 0])
    draw_spectra([above, figure.add_subplot(grid[1, 0], sharex=above)], spectra)
    draw_distortion(figure.add_subplot(grid[:, 1]))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("method.png"))
