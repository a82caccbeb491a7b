"""The reference of every operator: what the codec's own file says, in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from narrowcast.codecs.base import Codec


def encode(codec: "Codec", x_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None) -> None:
    """Code [T, E] into uint8 [T, B]."""
    codec._encode(x_TE, source, out_TB, stats)


def encode_with_residue(
    codec: "Codec", x_TE: Tensor, residue_TE: Tensor, source: int, out_TB: Tensor, stats: Tensor | None
) -> None:
    """Code x + residue in FP32, and leave in the residue what is lost, or nothing of what is not finite."""
    y_TE = x_TE.float() + residue_TE
    codec.encode(y_TE, source=source, out=out_TB, stats=stats)
    lost_TE = y_TE - codec.decode(out_TB, source=source, out=torch.empty_like(y_TE))
    residue_TE.copy_(torch.where(lost_TE.isfinite(), lost_TE, 0.0))


def decode_sum(codec: "Codec", payloads_RTB: Tensor, first_source: int, out_TE: Tensor) -> None:
    """Decode the payloads of the sources from `first_source` on and add them up in rank order."""
    codec._decode_sum(payloads_RTB, first_source, out_TE)


def recode(
    codec: "Codec",
    payloads_RTB: Tensor,
    reduced: "Codec",
    num_features: int,
    out_TB: Tensor,
    stats: Tensor | None,
) -> None:
    """Decode the payloads of all sources, add them up in FP32, and code the sum with `reduced`."""
    total_TE = codec.decode_sum(payloads_RTB, num_features=num_features)
    reduced.encode(total_TE, source=0, out=out_TB, stats=stats)
