"""Calibration from live traffic: whoever serves sees ranges and variances of what travels, and a plan comes of it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from narrowcast.calibration.live import WINDOW, LiveCommunicator, WindowObserver, live_recipe
from narrowcast.calibration.observers import RangeObserver, exact_sum
from narrowcast.codecs import Ranges
from narrowcast.errors import InvalidInputError
from narrowcast.plan import ModelFingerprint, Plan
from narrowcast.plan.split import Split
from narrowcast.transport import connect_group
from ranks import LIMIT_S, Ranks

SITES, NUM_FEATURES, NUM_TOKENS = ("first", "second"), 64, 48
PARTS = 1, 40, 7, 5, 20  # tokens of sums one after the other: the first three have as many as are asked for
CPU = torch.device("cpu")


def partials(part: int, site: str) -> list[Tensor]:
    """Of both ranks, in BF16; one site's values are a hundred times as large as the other's."""
    place = SITES.index(site)
    seeded, sizes_E = torch.Generator().manual_seed(part + 100 * place), torch.arange(1, 65) / 100**place
    return list((torch.randn(2, PARTS[part], NUM_FEATURES, generator=seeded) * sizes_E).bfloat16())


def seen_in(pieces: Sequence[int]) -> Ranges:
    """The ranges of the ranks' values after three windows of tokens in such pieces."""
    values = torch.randn(2, 3 * WINDOW, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    ranges = RangeObserver("count", 0)
    windows = WindowObserver(ranges)
    for x_RTE in values.split(list(pieces), dim=1):
        windows.see_sum(list(x_RTE), x_RTE.sum(dim=0), "site")
    windows.end("site")
    return ranges.ranges(["site"])["site"][0]


def test_requests_count_alike_whatever_their_parts() -> None:
    """A decoded token alone has hardly any range: only those of as many tokens as a sequence has are averaged."""
    whole, parts = seen_in([WINDOW] * 3), seen_in([WINDOW - 1, 1, *[1] * WINDOW, WINDOW])
    assert torch.equal(whole.low, parts.low) and torch.equal(whole.high, parts.high)
    assert not torch.equal(whole.low, seen_in([WINDOW, 2 * WINDOW]).low), "a check that can fail"


@torch.inference_mode()
def serve(codec: str) -> tuple[list[Tensor], bytes | None]:
    """The sums of both sites as a rank gets them, and the plan that it made."""
    plans: list[Plan | InvalidInputError] = []
    wires = LiveCommunicator(
        SITES,
        live_recipe(codec),
        NUM_TOKENS,
        tp=connect_group(None, device=CPU),
        device=CPU,
        split=Split(tp_size=2),
        model=ModelFingerprint(config={"hidden_size": NUM_FEATURES}, samples={}),
        on_plan=plans.append,
    )
    operators = {site: wires.partial_sums(site) for site in SITES}
    operators["first"](torch.full((3, NUM_FEATURES), 1e6))  # warms up, before anything counts
    wires.begin()
    sums = [operators[site](partials(part, site)[wires.tp.rank]) for part in range(len(PARTS)) for site in SITES]
    if wires.thread is not None:
        wires.thread.join(LIMIT_S)
    (plan,) = plans or [None]
    assert plan is None or isinstance(plan, Plan)
    return sums, None if plan is None else plan.to_bytes()


@pytest.mark.parametrize("codec", ["allocated(bits=4)", "int4-feature"])
def test_sums_stay_exact_and_the_first_rank_makes_the_plan(codec: str) -> None:
    with Ranks(2) as ranks:
        (sums, data), (others, nothing) = ranks.run(serve, codec)
    expected = [exact_sum(partials(part, site)) for part in range(len(PARTS)) for site in SITES]
    for found in (sums, others):
        assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert nothing is None and data is not None
    plan = Plan.from_bytes(data, "memory")
    assert list(plan.sites) == list(SITES)
    for site in SITES:
        coded, (first, *_) = torch.cat([partials(part, site)[0] for part in range(3)]), plan.sites[site].codecs
        lost = first.decode(first.encode(coded, source=0), source=0).float() - coded.float()
        assert lost.norm() < 0.15 * coded.float().norm(), "as four bits do, of these tokens"
    assert not plan.feedback.chains and "KL" in plan.calibration["missing"]
    assert "depth feedback at 0 of 2 sums" in str(plan) and "live traffic does not say" in str(plan)


@pytest.mark.parametrize("codec", ["transform", "allocated(target_kl=0.01)"])
def test_a_codec_that_takes_more_than_traffic_is_refused(codec: str) -> None:
    with pytest.raises(InvalidInputError, match=r"expected one of ranges or variances.*found one that takes gradients"):
        live_recipe(codec)
