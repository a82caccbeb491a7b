"""Quantizers for what remains after scaling: made for a normal source, for the values themselves, and a uniform one.

usage: python benchmarks/codebooks.py [--json FILE] [--model FOLDER] [--calibrate TEXT] [--score TEXT]

TEXT: as frontier.py has it. The values are those that `allocated` codes at 3 bits, TP 8, by width; errors are of values
that no quantizer was fitted to.
"""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import reporting
import torch
from frontier import budget
from scoring import Texts
from torch import Tensor

from narrowcast import Plan
from narrowcast.calibration import observe
from narrowcast.codecs import AllocatedCodec, lloyd_max
from narrowcast.codecs.allocation import BLOCK
from narrowcast.evaluation import evaluate


def rows(texts: Texts) -> Iterator[dict[str, Any]]:
    """Mean square error of a coded value, relative to its variance, by width: of blocks that are given that width."""
    seen = observe(texts.model, texts.calibration, tp_size=8, moments="diagonal")
    plan = seen.plan(budget("allocated({})", 3.0, "one_shot"))
    values = _scaled_values(texts, plan)
    for width in range(1, 9):
        u = torch.cat(values.get(width, [torch.empty(0)]))
        if len(u) < 10000:
            continue
        fit, test = u[::2], u[1::2]
        yield {
            "bits": width,
            "num_values": len(u),
            "kurtosis": float((u**4).mean() / u.square().mean() ** 2),
            "normal Lloyd-Max": _error(test, lloyd_max.levels(width)),
            "Lloyd-Max of these values": _error(test, _lloyd(fit, width)),
            "clipped uniform": min(
                _error(test, (torch.arange(2 ** (width - 1)) + 0.5) * 2 * reach / 2**width)
                for reach in torch.linspace(0.8, 8, 60).tolist()
            ),
        }


def _scaled_values(texts: Texts, plan: Plan) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    encode = AllocatedCodec.encode

    def watch(codec: Any, x_TE: Tensor, *, source: int, **options: Any) -> Tensor:
        order, u_TE = codec.order[source].long(), x_TE.float() / codec.scale[source].float()
        coded = order[: BLOCK * int((codec.widths[source] > 0).sum())]
        scale = u_TE[:, coded].square().mean(dim=1, keepdim=True).sqrt()  # the codec's own is this, rounded
        for place, width in enumerate(codec.widths[source].tolist()):
            own = order[BLOCK * place : BLOCK * (place + 1)]
            if width:
                found.setdefault(width, []).append((u_TE[:, own] / scale).flatten()[::7])
        return encode(codec, x_TE, source=source, **options)

    with mock.patch.object(AllocatedCodec, "encode", watch):
        evaluate(texts.model, plan, texts.batches[:4], algorithm="one_shot", reference=texts.reference[:4])
    return found


def _error(u: Tensor, levels: Tensor) -> float:
    nearest = levels[torch.bucketize(u.abs(), (levels[1:] + levels[:-1]) / 2)]
    return float((u.abs() - nearest).square().mean() / u.square().mean())


def _lloyd(u: Tensor, width: int) -> Tensor:
    magnitude = u.abs()
    levels = lloyd_max.levels(width)
    for _ in range(100):
        cell = torch.bucketize(magnitude, (levels[1:] + levels[:-1]) / 2)
        count = torch.zeros(len(levels)).index_add_(0, cell, torch.ones_like(magnitude))
        total = torch.zeros(len(levels)).index_add_(0, cell, magnitude)
        levels = torch.where(count > 0, total / count.clamp(min=1), levels).sort().values
    return levels


def main() -> None:
    parser = reporting.parser(__doc__)
    Texts.add_arguments(parser)
    asked = parser.parse_args()
    texts, table = Texts.of(asked), []
    for found in rows(texts):
        table.append(found)
        print(*(f"{key} {value:.5g} " for key, value in found.items()), flush=True)
    reporting.write(asked.json, **texts.setting, rows=table)


if __name__ == "__main__":
    main()
