"""Few tokens unlike all others, and little text: what calibration makes of them, and what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import narrowcast
from commands import run
from conftest import MODEL
from models import random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.calibration.fit import fit
from narrowcast.calibration.moments import MomentObserver, Moments
from narrowcast.calibration.observers import PowerObserver
from narrowcast.calibration.observing import SampledWires
from narrowcast.calibration.text import sequences
from narrowcast.codecs import recipe
from narrowcast.engines import load_engine
from narrowcast.errors import CalibrationWarning
from narrowcast.plan import ModelFingerprint, Site
from narrowcast.plan.split import Split
from narrowcast.plan.summary import doubts

NUM_FEATURES, NUM_TOKENS = 128, 256


def partials(first: float) -> list[Tensor]:
    """Of two ranks: the first token is `first` times as large at a few features."""
    x_RTE = torch.randn(2, NUM_TOKENS, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    x_RTE[:, 0, :32] *= first
    return list(x_RTE)


def site_of(x: list[Tensor], num_left_out: int) -> Site:
    moments = MomentObserver(num_left_out=num_left_out)
    moments.see_sum(x, x[0] + x[1], "site")
    partial, total = moments.means()["site"]
    of_sums = {"site": Moments(partial=partial, total=total, fisher=torch.ones(NUM_FEATURES))}
    codecs = fit(of_sums, recipe("allocated(bits=4)"), bits=4, algorithm="one_shot")["site"]
    return Site(kind="sum", codecs=codecs, error={})


def error(site: Site, x: list[Tensor], *, first: int = 1) -> float:
    """The relative error of tokens from `first` on."""
    codec, exact = site.codecs[0], (x[0] + x[1])[first:]
    payloads = torch.stack([codec.encode(part[first:], source=rank) for rank, part in enumerate(x)])
    return float((codec.decode_sum(payloads) - exact).norm() / exact.norm())


def test_expected_errors_are_of_ordinary_tokens() -> None:
    """A first token a thousand times as large takes all bits; its own small error does not hide that of the others."""
    x = partials(1000.0)
    site = site_of(x, num_left_out=0)
    plan = Plan(
        split=Split(tp_size=2), model=ModelFingerprint(config={}, samples={}), calibration={}, sites={"site": site}
    )
    wires = SampledWires([], plan, "one_shot", x[0].device)
    wires.sum(x, "site")
    expected = wires.samples["site"].error
    assert expected is not None
    assert expected == pytest.approx(error(site, x), rel=1e-3)
    assert expected > 0.2 > 20 * error(site, x, first=0)


def test_first_tokens_that_are_left_out_leave_the_others_their_bits() -> None:
    x, ordinary = partials(1000.0), partials(1.0)
    skipped = error(site_of(x, num_left_out=4), x)
    assert skipped == pytest.approx(error(site_of(ordinary, num_left_out=0), ordinary), rel=0.02)
    assert skipped < 0.15


def test_a_short_sequence_counts_with_its_last_token() -> None:
    moments = MomentObserver(num_left_out=4)
    short = [torch.full((2, 8), float(rank)) for rank in (1, 2)]
    moments.see_sum(short, short[0] + short[1], "site")
    partial, total = moments.means()["site"]
    assert partial.tolist() == [[1.0] * 8, [4.0] * 8] and total.tolist() == [[9.0] * 8]


@pytest.mark.parametrize(("first", "num_left_out", "ruled"), [(4.0, 0, False), (1000.0, 0, True), (1000.0, 4, False)])
def test_sites_that_few_tokens_rule_are_found(first: float, num_left_out: int, ruled: bool) -> None:
    powers = PowerObserver(num_left_out)
    x = partials(first)
    powers.see_sum(x, x[0] + x[1], "site")
    powers.see(torch.zeros(3, NUM_FEATURES), "nothing")
    assert powers.ruled_by_few() == (["site"] if ruled else [])


def test_a_plan_tells_where_few_tokens_leave_little_of_others(tmp_path: Path) -> None:
    plan = calibrated(tmp_path, [random_ids(1, 64, seed=seed) for seed in range(24)], "int4-feature")
    names = [*plan.sites]
    ruled = replace(plan, calibration={**plan.calibration, "ruled_by_few": names[:3]})
    assert list(doubts(ruled)) == [], "with errors that others have, too"
    errors = dict(zip(names, (0.6, 0.985, 0.4, 0.99), strict=True))
    sites = {name: replace(site, error={"one_shot": errors[name]}) for name, site in plan.sites.items()}
    (doubt,) = doubts(replace(ruled, sites=sites))
    assert "at 2 sites, and all others have an error of 0.98 at 0.mlp.down_proj" in doubt


def calibrated(folder: Path, text: list[Tensor], codec: str) -> Plan:
    model = load_engine().load(save_random("llama", folder / "model"), dtype="float32")
    return narrowcast.calibrate(model, text, tp_size=2, codec=codec)


@pytest.mark.parametrize(
    ("codec", "enough"), [("int4-feature", "1,000"), ("allocated(bits=4)", "1,000"), ("transform(bits=2)", "6,144")]
)
def test_too_little_text_is_told(codec: str, enough: str, tmp_path: Path) -> None:
    with pytest.warns(CalibrationWarning, match=f"calibrated on 30 tokens of text, where {enough} would be enough"):
        calibrated(tmp_path, [random_ids(1, 30)], codec)


@pytest.mark.filterwarnings("error")
def test_codecs_that_text_tells_nothing_want_none(tmp_path: Path) -> None:
    calibrated(tmp_path, [random_ids(1, 30)], "int4-group128")


def test_the_command_counts_tokens_and_warns(tmp_path: Path) -> None:
    text = MODEL / "scoring.txt"
    done = run(
        "calibrate", MODEL, "--text", text, "--num-samples", 2, "-o", tmp_path / "plan", "--codec", "int4-feature"
    )
    assert "from 2 sequences, 511 tokens; none held out" in done
    assert "nats from the uncompressed model, on a part of this very text" in done
    assert "warning: calibrated on 511 tokens of text, where 1,000 would be enough" in done
    assert "warning: calibrated on 511 tokens" in " ".join(run("inspect", tmp_path / "plan").split())


def test_blank_documents_are_no_text(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "text", load_engine().load_tokenizer(MODEL)
    path.write_text("\n\n\n \n\f\n\n\fIt was a dark and stormy night.\f\n")
    assert len(sequences(tokenizer, path, length=16)) == 1
    path.write_text("\n\n\n \n\f\n\n\f")
    with pytest.raises(InvalidInputError, match="expected at least two tokens of text, found none"):
        sequences(tokenizer, path, length=16)


def test_there_are_no_outliers_to_choose_in_fitted_codecs(tmp_path: Path) -> None:
    model = load_engine().load(save_random("llama", tmp_path / "model"), dtype="float32")
    with pytest.raises(
        InvalidInputError, match="expected count or skip, as allocated and transform choose no outliers"
    ):
        narrowcast.calibrate(model, [random_ids(1, 30)], tp_size=2, first_tokens="choosing")
