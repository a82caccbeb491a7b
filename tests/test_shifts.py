"""Rounds of two runs compared by their order: exact, deaf to a stray round, quiet where nothing moved."""

import itertools
import random
import statistics

import pytest

from narrowcast.evaluation.verdict import LEVEL, Change, between_rounds, corrected
from narrowcast.scores.shifts import p_above, ratio_between


@pytest.mark.parametrize("above", range(13))
def test_p_is_the_share_of_orders_that_are_as_far_apart(above: int) -> None:
    """All 35 ways to deal out seven places to three of mine and four of theirs."""

    def pairs(mine: tuple[int, ...]) -> int:
        theirs = set(range(7)) - set(mine)
        return sum(one > other for one in mine for other in theirs)

    dealt = list(itertools.combinations(range(7), 3))
    mine = next(each for each in dealt if pairs(each) == above)
    expected = sum(pairs(each) >= above for each in dealt) / len(dealt)
    assert p_above(mine, sorted(set(range(7)) - set(mine))) == pytest.approx(expected)


def test_equal_rounds_are_no_sign_of_anything() -> None:
    assert p_above([3.0] * 8, [3.0] * 8) > 0.5
    assert ratio_between([3.0] * 8, [3.0] * 8) == (1.0, 1.0)


def test_three_rounds_are_too_few_for_an_interval() -> None:
    assert ratio_between([1, 2, 3], [4, 5, 6]) is None
    assert ratio_between([1, 2, 3, 4], [4, 5, 6, 7]) is not None


def test_the_interval_holds_the_ratio_as_often_as_it_says() -> None:
    source, held = random.Random(0), 0
    for _ in range(400):
        theirs, mine = ([scale * source.lognormvariate(0, 0.2) for _ in range(8)] for scale in (1, 1.5))
        interval = ratio_between(theirs, mine)
        assert interval is not None
        held += interval.low <= 1.5 <= interval.high
    assert held / 400 > 0.93


def ms(*rounds: float, before: tuple[float, ...] = (10, 10.2, 9.9, 10.1, 10.3, 9.8, 10, 10.1)) -> Change:
    """The change from rounds of 10 ms, of which 5 % are tolerated."""
    change = between_rounds(before, rounds, tolerated=0.05 * statistics.median(before), less_is_better=True)
    return corrected({"ms": change})["ms"]


def test_speed_is_worse_beyond_both_the_spread_and_the_tolerance() -> None:
    assert ms(12, 11.9, 12.1, 12.3, 11.8, 12, 12.2, 12).verdict == "worse"
    assert ms(8, 7.9, 8.1, 8.3, 7.8, 8, 8.2, 8).verdict == "better"
    within_tolerance = ms(
        *(each + 0.3 for each in (10, 10.05, 9.98, 10.02, 10.01, 9.97, 10, 10.03)), before=(10, 10.02, 10.01, 9.98) * 2
    )
    assert within_tolerance.p_worse < 0.001 and within_tolerance.verdict == "same"
    assert ms(10, 30, 9.9, 25, 28, 9.8, 10, 31).verdict == "unclear"


def test_a_stray_round_is_no_more_than_one() -> None:
    assert ms(10, 10.2, 9.9, 10.1, 1000, 9.8, 10, 10.1).verdict == "same"
    slow = 12, 11.9, 12.1, 12.3, 11.8, 12, 12.2, 12
    assert ms(*slow, before=(10, 10.2, 9.9, 10.1, 1000, 9.8, 10, 10.1)).verdict == "worse"


def test_false_alarms_over_all_figures_are_as_rare_as_promised() -> None:
    source, alarms = random.Random(0), 0
    for _ in range(600):
        found = {}
        for name in "abcd":
            rounds = ([source.lognormvariate(0, 0.3) for _ in range(8)] for _ in range(2))
            found[name] = between_rounds(*rounds, tolerated=0.0, less_is_better=True)
        alarms += any(change.verdict == "worse" for change in corrected(found).values())
    assert 0.01 < alarms / 600 < LEVEL + 3 * (LEVEL * (1 - LEVEL) / 600) ** 0.5
