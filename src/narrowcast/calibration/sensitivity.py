"""Sensitivities: how much answers mind an error in each sum, found by trying one. No gradients: ranks can do it.

To second order, white noise of the power s^2 in each of the E features of a sum costs a KL divergence of s^2 trace(F) /
2, F being the Fisher information there: two runs tell trace(F) / E, the sensitivity of that site's features (mostly
within a tenth of what gradients tell). Where depth feedback makes an error good at the next site, what it costs in
between is found alike: the same noise, taken back there. There features differ, by what the block in between reads of
them (`calibration.reading`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from narrowcast.calibration.observing import ObservedWires, over_wires
from narrowcast.calibration.reading import reading
from narrowcast.plan.chains import Chains
from narrowcast.plan.split import Split
from narrowcast.progress import told
from narrowcast.scores import kl_nats, log_probs

MAX_TOKENS = 128  # of text that is tried
UNTIL_NEXT = 0.75  # decision 0031
# The noise is as large as makes this KL divergence, about, and tried again where it is beyond these times that: a
# smaller one drowns in the rounding of BF16, a larger one is not of second order.
KL_OF_NOISE, WITHIN = 0.02, (0.2, 5.0)
FIRST_NOISE, MAX_TRIES, LEAST_KL = 0.05, 4, 1e-5  # of the root mean square of the largest sum


class Disturbed(ObservedWires):
    """Wires over which one site's sum is disturbed: for good in the first sequence, until the next site in the second.

    Without a next site both are disturbed for good.
    """

    def __init__(self, tp_size: int) -> None:
        super().__init__((), tp_size)
        self._noise: dict[str, Sequence[float]] = {}  # by site, for either sequence

    def disturb(self, site: str, following: str | None, sizes: Sequence[float]) -> None:
        """Let `site` have noise of these root mean squares, for good and until the next site, and nothing else."""
        self._noise = {site: sizes}
        if following is not None:
            self._noise[following] = (0.0, -sizes[1])

    def sum(self, partials: Sequence[Tensor], site: str, residue: Tensor | None = None) -> Tensor:
        total = super().sum(partials, site)
        if (sizes := self._noise.get(site)) is None:
            return total
        disturbed = total.reshape(len(sizes), -1, total.shape[-1]).clone()  # experts are given tokens in one row
        noise_TE = torch.randn(disturbed.shape[1:], generator=torch.Generator().manual_seed(0)).to(total.device)
        for sequence_TE, size in zip(disturbed, sizes, strict=True):
            sequence_TE += (size * noise_TE).to(total.dtype)
        return disturbed.view(total.shape)


class Sensitivity(NamedTuple):
    """The stand-in for the diagonal of the Fisher information in a sum, [E].

    `lasting`: of an error that nothing makes good, alike for all features. `fed_back`: of one that is made good at the
    next site, if there is one: a geometric mean of what it costs for good and of what it costs until then, with
    UNTIL_NEXT as the latter's weight and that of what is read of each feature. The latter alone would be right if
    what is lost were small and nothing were read but what the weights say.
    """

    lasting: Tensor
    fed_back: Tensor


def sensitivities(
    model: nn.Module, split: Split, chains: Chains, power: Mapping[str, Tensor], ids: Tensor
) -> dict[str, Sensitivity]:
    """The sensitivity of each site of `power`.

    `power`: mean squares [1, E] of each sum, of all stages, which every rank of a split model passes alike. `ids`: text
    [T].
    """
    following, read = chains.following, reading(model, chains)
    wires, found = Disturbed(split.tp_size), {}
    ids_BT = ids[None, :MAX_TOKENS].repeat(2, 1)
    with over_wires(wires, model, split):
        plain = log_probs(model, ids_BT)
        largest = max((mean.mean().item() for mean in power.values()), default=0.0) or 1.0  # all may be nothing
        sizes = [FIRST_NOISE * largest**0.5] * 2
        for site, mean in told(list(power.items()), "trying errors"):
            if site not in following:  # both last, and are the same
                sizes = [sizes[0]] * 2
            for _ in range(MAX_TRIES):
                wires.disturb(site, following.get(site), sizes)
                costs = kl_nats(plain, log_probs(model, ids_BT)).mean(dim=1).tolist()
                for_good, until_next = (2 * kl / size**2 for kl, size in zip(costs, sizes, strict=True))
                sizes = [size * (KL_OF_NOISE / max(kl, LEAST_KL)) ** 0.5 for kl, size in zip(costs, sizes, strict=True)]
                if all(WITHIN[0] <= kl / KL_OF_NOISE <= WITHIN[1] for kl in costs):
                    break
            traces = for_good, for_good ** (1 - UNTIL_NEXT) * until_next**UNTIL_NEXT
            lasting, fed_back = (torch.full_like(mean[0], trace / mean.shape[1]) for trace in traces)
            if site in read:
                by_feature = read[site].to(mean.device) ** UNTIL_NEXT
                fed_back = fed_back * by_feature / by_feature.mean()
            found[site] = Sensitivity(lasting, fed_back)
    return found
