"""Finding by trial the norms that read the residual stream between two sums, and the modules that compute from them.

In a run on a few tokens each small module's input is noted. Where it grows from one to the next by a multiple of the
sums in between, and by nothing else, both read the stream; what they give is followed to the modules that compute each
rank's own share.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from narrowcast.plan.chains import Reader

# What adding sums to a stream in BF16 may round away: of the magnitudes, one unit in the last of eight places.
ROUNDING = 2.0**-7
TOLERANCE = 0.02  # of the sums' multiple
# A multiple is believed where the sums stand out from what rounding may hide, at so many of the features.
LEAST_TOLD = 0.1
ONE = 0.01  # from which a multiple is told apart
MOST_SUMS = 2  # between two readers of a stream: attention and MLP of a layer


class Call(NamedTuple):
    """A call of a small module: how many sums came before, the input [T, E], and the output."""

    name: str
    num_before: int
    x_TE: Tensor
    output: Tensor


class Watch:
    """Notes calls, and which modules are given what they return. `added`: sums and the like, as they come."""

    def __init__(self, modules: Sequence[str], added: Sequence[str]) -> None:
        self._modules, self._added = modules, added
        self.calls: list[Call] = []
        self.given: dict[str, str] = {}  # the module that gave, by the one that was given
        self._ambiguous: set[str] = set()

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch a model's calls."""
        hooks = [
            module.register_forward_hook(self._noting(name))
            for name, module in model.named_modules()
            if not list(module.children()) and all(weight.ndim < 2 for weight in module.parameters())
        ]
        hooks += [model.get_submodule(name).register_forward_pre_hook(self._following(name)) for name in self._modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            x = inputs[0] if len(inputs) == 1 else None
            if isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape:
                self.calls.append(Call(name, len(self._added), x.detach().flatten(0, -2).clone(), output))

        return note

    def _following(self, name: str) -> Callable[..., None]:
        def follow(module: nn.Module, inputs: tuple[object, ...]) -> None:
            x = inputs[0] if inputs else None
            givers = [
                call.name
                for call in self.calls
                if isinstance(x, Tensor) and x.data_ptr() == call.output.data_ptr() and x.numel() == call.output.numel()
            ]
            if name in self.given or not givers:
                self._ambiguous.add(name)
            else:
                self.given[name] = givers[-1]

        return follow

    def readers(self, sums: Mapping[str, Tensor], chains: Collection[Sequence[str]]) -> dict[str, Reader]:
        """The readers, by name. `sums`: [T, E] by site; `chains`: those that leave what they lose to the next one."""
        of_chains = {site for chain in chains for site in chain}
        alive = of_chains - {chain[-1] for chain in chains}
        found: dict[str, Reader] = {}
        names = [call.name for call in self.calls]
        for place, call in enumerate(self.calls):
            modules = tuple(
                name for name, giver in self.given.items() if giver == call.name and name not in self._ambiguous
            )
            last = next((site for site in reversed(self._added[: call.num_before]) if site in of_chains), "")
            if not modules or last not in alive or names.count(call.name) > 1:
                continue
            scale = self._scale(call, self.calls[:place], sums)
            if scale is not None:
                found[call.name] = Reader(after=last, modules=modules, scale=scale)
        return found

    def _scale(self, call: Call, earlier: Sequence[Call], sums: Mapping[str, Tensor]) -> float | None:
        """The multiple of the sums since an earlier reader that arrives here; None where none tells."""
        for other in reversed(earlier):
            between = self._added[other.num_before : call.num_before]
            if 0 < len(between) <= MOST_SUMS and all(site in sums for site in between):
                scale = _multiple(call.x_TE, other.x_TE, [sums[site] for site in between])
                if scale is not None:
                    return scale
        return None


def _multiple(after_TE: Tensor, before_TE: Tensor, sums: Sequence[Tensor]) -> float | None:
    """c, if `after` is `before` and c times the sums, but for rounding."""
    if after_TE.shape != before_TE.shape or after_TE.shape != sums[0].shape:
        return None
    after, before = after_TE.double(), before_TE.double()
    grown, total = after - before, torch.stack([x.double() for x in sums]).sum(dim=0)
    hidden = ROUNDING * (after.abs() + before.abs())
    scale = ((grown * total).sum() / total.square().sum().clamp(min=1e-300)).item()
    told = (scale * total).abs() > 4 * hidden
    fits = (grown - scale * total).abs() <= hidden + TOLERANCE * (scale * total).abs()
    if not bool(fits.all()) or told.double().mean().item() < LEAST_TOLD:
        return None
    return 1.0 if abs(scale - 1) < ONE else float(f"{scale:.3g}")
