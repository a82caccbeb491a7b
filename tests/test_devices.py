"""No codec waits for a device: what it asks of one is known on the host.

Tensors of the "meta" device have no values, so that whatever asks for one (`item`, a branch, an index by a mask) fails.
"""

import pytest
import torch

from formats import FORMATS
from models import calibrated
from narrowcast.codecs import kernels

every_format = pytest.mark.parametrize("preset", FORMATS)
META = torch.device("meta")


@every_format
@pytest.mark.parametrize("num_features", [70, 130, 256])
def test_no_operator_asks_for_a_value(preset: str, num_features: int) -> None:
    codec, reduced = calibrated(preset, torch.randn(3, 20, num_features))
    row_nbytes = codec.row_nbytes(num_features)
    x_TE = torch.empty(5, num_features, dtype=torch.bfloat16, device=META)
    stats = torch.zeros(3, dtype=torch.int64, device=META)
    payloads_RTB = torch.empty(3, 5, row_nbytes, dtype=torch.uint8, device=META)
    assert codec.encode(x_TE, source=2, out=payloads_RTB[2], stats=stats).shape == (5, row_nbytes)
    assert codec.encode(x_TE, source=2).device == META
    assert codec.decode(payloads_RTB[1], source=1, num_features=num_features).shape == x_TE.shape
    assert codec.decode_sum(payloads_RTB, out=torch.empty_like(x_TE)).device == META
    out_TB = torch.empty(5, reduced.row_nbytes(num_features), dtype=torch.uint8, device=META)
    assert codec.recode(payloads_RTB, reduced, num_features=num_features, out=out_TB, stats=stats) is out_TB


@every_format
def test_tables_move_to_a_device_once(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first call nothing is copied from the host: no tensor of the CPU takes part."""
    codec, reduced = calibrated(preset, torch.randn(2, 20, 70))
    x_TE = torch.empty(5, 70, device=META)

    def run() -> None:
        payload_TB = codec.encode(x_TE, source=0)
        out_TB = torch.empty(5, reduced.row_nbytes(70), dtype=torch.uint8, device=META)
        codec.recode(torch.stack([payload_TB] * 2), reduced, num_features=70, out=out_TB)

    run()
    monkeypatch.setattr(torch.Tensor, "to", forbid_copies(torch.Tensor.to))
    monkeypatch.setattr(torch, "tensor", forbid_new_tables(torch.tensor))
    run()


def forbid_copies(original):  # type: ignore[no-untyped-def]
    def to(tensor, *arguments, **options):  # type: ignore[no-untyped-def]
        moved = original(tensor, *arguments, **options)
        assert moved.device == tensor.device, "copied to another device"
        return moved

    return to


def forbid_new_tables(original):  # type: ignore[no-untyped-def]
    def tensor(values, *arguments, **options):  # type: ignore[no-untyped-def]
        assert isinstance(values, float), "a table made anew"
        return original(values, *arguments, **options)

    return tensor


@every_format
def test_the_references_leave_their_inputs_as_they_are(preset: str) -> None:
    x_RTE = torch.randn(2, 5, 70)
    codec, reduced = calibrated(preset, x_RTE)
    with kernels.forced(kernels.REFERENCE):
        given = x_RTE.clone()
        payloads_RTB = torch.stack([codec.encode(x_TE, source=rank) for rank, x_TE in enumerate(given)])
        assert torch.equal(given, x_RTE)
        kept = payloads_RTB.clone()
        codec.decode_sum(payloads_RTB, num_features=70)
        out_TB = torch.empty(5, reduced.row_nbytes(70), dtype=torch.uint8)
        codec.recode(payloads_RTB, reduced, num_features=70, out=out_TB)
        assert torch.equal(payloads_RTB, kept)
