"""Yesterday's payloads: every format's bytes and what they decode to, as first committed.

Every codec of `formats.FORMATS` has a file. A file here is never written again: another layout is another codec id.
`python tests/test_golden.py` adds files for codecs that have none yet.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats import FORMATS
from models import calibrated
from narrowcast.codecs import CODECS

FOLDER = Path(__file__).parent / "golden"
DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.uint8)}


def to_json(x: Tensor) -> dict[str, Any]:
    raw = x.contiguous().view(torch.uint8) if x.numel() else x.to(torch.uint8)
    return {"dtype": str(x.dtype), "shape": list(x.shape), "hex": bytes(raw.flatten().tolist()).hex()}


def from_json(value: dict[str, Any]) -> Tensor:
    raw = torch.tensor(list(bytes.fromhex(value["hex"])), dtype=torch.uint8)
    return raw.view(DTYPES[value["dtype"]]).view(value["shape"])


@pytest.mark.parametrize("spelt", FORMATS)
def test_payloads_are_those_of_the_first_day(spelt: str) -> None:
    golden = json.loads((FOLDER / f"{spelt}.json").read_text(encoding="utf8"))
    tensors = {name: from_json(value) for name, value in golden["tensors"].items()}
    codec = CODECS[golden["codec"]].from_state(golden["config"], tensors)
    x_RTE, payloads_RTB, sum_TE = (from_json(golden[key]) for key in ("values", "payloads", "sum"))
    for rank, x_TE in enumerate(x_RTE):
        assert torch.equal(codec.encode(x_TE, source=rank), payloads_RTB[rank])
    found = codec.decode_sum(payloads_RTB, num_features=x_RTE.shape[2])
    assert torch.equal(found.view(torch.int32), sum_TE.view(torch.int32))


def write_missing() -> None:
    for spelt in FORMATS:
        path = FOLDER / f"{spelt}.json"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(len(spelt))
        x_RTE = torch.randn(2, 2, 130, generator=generator)
        codec, _ = calibrated(spelt, x_RTE * 0.9)
        x_RTE[0, 1, 128], x_RTE[1, 1, 4] = torch.inf, torch.nan
        x_RTE[1, 0, :65] = 0.0
        payloads_RTB = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(x_RTE)])
        config, tensors = codec.state()
        golden = {
            "codec": codec.id,
            "config": config,
            "tensors": {name: to_json(tensor) for name, tensor in tensors.items()},
            "values": to_json(x_RTE),
            "payloads": to_json(payloads_RTB),
            "sum": to_json(codec.decode_sum(payloads_RTB, num_features=x_RTE.shape[2])),
        }
        path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    write_missing()
