"""The share of each feature in what the block after a sum reads: which errors it minds until the next one.

To first order a block's work moves with an error in the residual stream by its first matrices, behind a norm: by the
norm's weight of a feature and the length of that feature's column. No text and no gradients: the weights say it.

Shapes: E features of the stream.
"""

import base64
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor, nn

from narrowcast.engines import engine_of
from narrowcast.plan.chains import Chains, Reader
from narrowcast.transport import Transport, transports_of

# Times the mean of a site's features: what is read less or more than that is so by accident.
LEAST, MOST = 1e-3, 1e3


def reading(model: nn.Module, chains: Chains) -> dict[str, Tensor]:
    """For each site that a norm of `chains` follows, how much is read of its features, fp32 [E], 1 on average.

    Every rank of a split model calls this.
    """
    engine, (tp, pp) = engine_of(model), transports_of(engine_of(model).groups(model))
    here = {name for name, _ in model.named_modules()}
    readers = {norm: reader for norm, reader in chains.readers.items() if norm in here}
    own = {module: engine.shares_read(model, module).cpu() for each in readers.values() for module in each.modules}
    of_all_ranks = _gathered(own, tp)
    read = {module: torch.stack([each[module] for each in of_all_ranks]).sum(dim=0) for module in own}
    found = {reader.after: _of_features(model.get_submodule(norm), reader, read) for norm, reader in readers.items()}
    return {site: each for stage in _gathered(found, pp) for site, each in stage.items()}


def _of_features(norm: nn.Module, reader: Reader, read: Mapping[str, Tensor]) -> Tensor:
    shares = torch.stack([read[module] / read[module].mean() for module in reader.modules])
    total_E = shares.sum(dim=0) * _weights(norm, shares.shape[1]).square()
    return (total_E / total_E.mean()).nan_to_num(1.0).clamp(LEAST, MOST).float()


def _weights(norm: nn.Module, num_features: int) -> Tensor:
    """The factors of a norm, by feature, whatever it calls them: half of what changes where all signs do."""
    like = next(norm.parameters(), torch.empty(0))
    signs = torch.ones(2, num_features, dtype=like.dtype, device=like.device)
    signs[0, ::2], signs[1, 1::2] = -1, -1
    with torch.no_grad():
        one, other = norm(signs[:, None]).double().cpu().flatten(0, 1)
    weights: Tensor = (one - other).abs() / 2
    return weights


def _gathered(own: Mapping[str, Tensor], transport: Transport | None) -> list[dict[str, Tensor]]:
    """The tensors of all ranks of a group, by rank."""
    if transport is None:
        return [dict(own)]
    text = base64.b85encode(safetensors.torch.save(dict(own))).decode()
    texts = transport.share(text, "sharing what is read of features")
    return [safetensors.torch.load(base64.b85decode(each)) for each in texts]
