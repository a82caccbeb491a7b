"""Attention of few queries in plain PyTorch, operation by operation what csrc/decode does: the same bits, slowly.

Sums have one order: over D sixteen partial sums, over exponentials sixteen, over values key after key, over pieces of
the context one after another.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

PIECE = 512  # keys that are attended to at once
_LANES, _BLOCK = 16, 32
_LOG2_E, _ROUNDING = 1.44269504088896341, 1.5 * 2**23
_LN2 = 0.693359375, -2.12194440e-4
_POLYNOMIAL = 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1


def attend(
    q_BHTD: Tensor,
    k_BGCD: Tensor,
    v_BGCD: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float,
    causal: bool,
) -> Tensor:
    """As `runtime.attention.attend`."""
    num_queries, context, group = q_BHTD.shape[2], k_BGCD.shape[2], q_BHTD.shape[1] // k_BGCD.shape[1]
    k_BHCD, v_BHCD = (x.repeat_interleave(group, dim=1) for x in (k_BGCD, v_BGCD))
    scores_BHTC = _dot(q_BHTD[:, :, :, None], k_BHCD[:, :, None]) * scale
    if softcap:
        scores_BHTC = _tanh(scores_BHTC / softcap) * softcap
    if mask is not None:
        seen = mask.dtype is torch.bool
        scores_BHTC = scores_BHTC.masked_fill(~mask, -math.inf) if seen else scores_BHTC + mask.float()
    if causal:
        later_TC = torch.ones(num_queries, context, dtype=torch.bool).triu(context - num_queries + 1)
        scores_BHTC = scores_BHTC.masked_fill(later_TC, -math.inf)
    pieces = zip(scores_BHTC.split(PIECE, dim=3), v_BHCD.float().split(PIECE, dim=2), strict=True)
    sums_BHTD, total_BHT1 = _joined([_of_piece(scores, v) for scores, v in pieces])
    mean_BHTD = torch.where(total_BHT1 == 0, 0.0, sums_BHTD / total_BHT1)
    return mean_BHTD.to(q_BHTD.dtype).transpose(1, 2).contiguous()


def attend_paged(
    q_BHTD: Tensor,
    k_1GCD: Tensor,
    v_1GCD: Tensor,
    places: Tensor,
    spans: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float,
    causal: bool,
) -> Tensor:
    """As `runtime.attention.attend` where keys are paged."""
    least, num_places = q_BHTD.shape[2], k_1GCD.shape[2]
    most = len(places) if mask is None else mask.shape[3]
    if not all(0 <= begin <= end <= len(places) and least <= end - begin <= most for begin, end in spans.tolist()):
        raise ValueError("spans that are none of these keys")
    if not all(0 <= place < num_places for place in places.tolist()):
        raise ValueError("keys that are not in the cache")
    found = []
    for b, (begin, end) in enumerate(spans.tolist()):
        own, seen = places[begin:end], None
        if mask is not None:
            seen = mask.expand(len(q_BHTD), -1, -1, -1)[b : b + 1, :, :, : end - begin]
        q, k, v = q_BHTD[b : b + 1], k_1GCD[:, :, own], v_1GCD[:, :, own]
        found.append(attend(q, k, v, scale, seen, softcap, causal))
    return torch.cat(found)


def append(
    q_BHTD: Tensor,
    k_BGCD: Tensor,
    v_BGCD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
) -> Tensor:
    """The queries, turned; new keys, turned, and values go into the last places."""
    num_tokens = q_BHTD.shape[2]
    k_BGCD[:, :, -num_tokens:] = turned(k_BGTD, cos_BTR, sin_BTR)
    v_BGCD[:, :, -num_tokens:] = v_BGTD
    return turned(q_BHTD, cos_BTR, sin_BTR)


def turned(x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """The rotary embedding as Transformers has it."""
    size = cos_BTR.shape[-1]
    first, rest = x_BHTD[..., :size], x_BHTD[..., size:]
    low, high = first.chunk(2, dim=-1)
    first = first * cos_BTR[:, None] + torch.cat((-high, low), dim=-1) * sin_BTR[:, None]
    return torch.cat((first, rest), dim=-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Products over the last dimension."""
    in_turn = -1, _BLOCK // _LANES, _LANES
    if x.dtype is torch.bfloat16:  # values at even places, then those at odd ones
        in_turn = -1, _LANES, _BLOCK // _LANES
    padding = 0, -x.shape[-1] % _BLOCK
    x, y = (functional.pad(each.float(), padding).unflatten(-1, in_turn) for each in (x, y))
    if in_turn[1] == _LANES:
        x, y = x.transpose(-1, -2), y.transpose(-1, -2)
    products = (x * y).flatten(-3, -2)
    return _total(_added_up(products, dim=-2))


def _added_up(x: Tensor, dim: int) -> Tensor:
    """The sum, one after another."""
    total = torch.zeros_like(x.select(dim, 0))
    for part in x.unbind(dim):
        total += part
    return total


def _total(lanes: Tensor) -> Tensor:
    quarters = lanes.unflatten(-1, (4, 4)).unbind(-2)
    a, b, c, d = ((quarters[0] + quarters[2]) + (quarters[1] + quarters[3])).unbind(-1)
    total: Tensor = (a + c) + (b + d)
    return total


def _of_piece(scores_BHTC: Tensor, v_BHCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest score, the sum of exponentials, [B, H, T, 1], and the weighted sum of values."""
    most = torch.where(scores_BHTC.isnan(), -math.inf, scores_BHTC).amax(dim=3, keepdim=True)
    p_BHTC = _exp(scores_BHTC - most.masked_fill(most == -math.inf, 0.0))
    by_lane = functional.pad(p_BHTC, (0, -p_BHTC.shape[3] % _LANES)).unflatten(3, (-1, _LANES))
    total = _total(_added_up(by_lane, dim=3))[..., None]
    weighted = zip(p_BHTC.split(1, dim=3), v_BHCD.split(1, dim=2), strict=True)
    sums = torch.zeros(*p_BHTC.shape[:3], v_BHCD.shape[3])
    for p_BHT1, v_BH1D in weighted:
        sums = sums + p_BHT1 * v_BH1D
    return most, total, sums


def _joined(pieces: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pieces) == 1:
        return pieces[0][2], pieces[0][1]
    most = torch.stack([piece[0] for piece in pieces]).amax(dim=0)
    most = most.masked_fill(most == -math.inf, 0.0)
    weights = [_exp(piece[0] - most) for piece in pieces]
    sums = _added_up(torch.stack([piece[2] * weight for piece, weight in zip(pieces, weights, strict=True)]), dim=0)
    return sums, _added_up(torch.stack([piece[1] * weight for piece, weight in zip(pieces, weights, strict=True)]), 0)


def _exp(x: Tensor) -> Tensor:
    """Of what is at most 0: zero below -87."""
    inside = x.clamp(min=-88.0)
    n = (inside * _LOG2_E + _ROUNDING) - _ROUNDING
    r = (inside - n * _LN2[0]) - n * _LN2[1]
    y = torch.full_like(r, 1.9875691500e-4)
    for coefficient in _POLYNOMIAL:
        y = y * r + coefficient
    y = (y * (r * r) + r) + 1.0
    power = ((n.nan_to_num().int() + 127).clamp(min=0) << 23).view(torch.float32)
    return torch.where(x < -87.0, torch.zeros_like(y), y * power)


def _tanh(x: Tensor) -> Tensor:
    small = _exp(x.abs() * -2.0)
    y = (1.0 - small) / (1.0 + small)
    return torch.where(x < 0, -y, y)
