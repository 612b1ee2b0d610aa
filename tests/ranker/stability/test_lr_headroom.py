"""The estimate of the largest stable learning rate, and the search for it, on hand-made outcomes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest

from ranker.errors import UserError
from ranker.stability.lr_headroom import Outcome, Search, headroom, isotonic, settled, survival, wilson

SEARCH = Search(lowest=0.125, highest=64.0, step=8.0, tolerance=1.5, points=1)


def outcomes(by_rate: Mapping[float, Sequence[bool | None]], *, auc: float = 0.7) -> list[Outcome]:
    """Seed i is the i-th of each list."""
    return [
        Outcome(rate=rate, seed=seed, survived=survived, auc=auc)
        for rate, found in by_rate.items()
        for seed, survived in enumerate(found)
    ]


def test_the_crossing_lies_between_the_rates_where_half_survive() -> None:
    found = headroom(outcomes({1: [True] * 3, 2: [True] * 3, 4: [True, False, False], 8: [False] * 3}))

    # p falls from 1 at 2x to 1/3 at 4x: half is three quarters of the way, in log lr.
    assert found is not None
    assert found.value == pytest.approx(2**1.75)
    # Seed 0 is drawn at least twice in 7 of 27 resamples: then 4x survives, and the bracket is 4x to 8x.
    assert (found.low, found.high) == (2, 8)
    assert str(found) == "3.36x [2x, 8x]"
    assert found.monotone
    assert not found.beyond


def test_seeds_that_agree_leave_the_bracket_as_the_interval() -> None:
    found = headroom(outcomes({4: [True] * 3, 6: [False] * 3}))

    assert found is not None
    assert (found.low, found.value, found.high) == (4, pytest.approx(math.sqrt(24)), 6)


def test_a_narrower_confidence_gives_a_narrower_interval() -> None:
    made = outcomes({2: [True] * 3, 4: [True, False, False], 8: [False] * 3})

    # The bracket 4x to 8x has a chance of 26 %: outside of the middle half's upper end, inside of 90 %.
    wide, narrow = headroom(made, confidence=0.9), headroom(made, confidence=0.4)
    assert wide is not None
    assert narrow is not None
    assert (wide.high, narrow.high) == (8, 4)


def test_all_surviving_is_a_lower_bound() -> None:
    found = headroom(outcomes({1: [True] * 2, 64: [True] * 2}))

    assert found is not None
    assert found.beyond == "above"
    assert str(found) == ">= 64x"


def test_none_surviving_is_an_upper_bound() -> None:
    found = headroom(outcomes({0.125: [False] * 2, 1: [False] * 2}))

    assert found is not None
    assert found.beyond == "below"
    assert str(found) == "< 0.125x"


def test_some_surviving_at_the_top_leaves_the_interval_open() -> None:
    found = headroom(outcomes({1: [True] * 3, 8: [True, True, False], 16: [True, False, False]}))

    assert found is not None
    assert found.beyond == ""
    assert math.isinf(found.high)
    assert str(found).endswith("no end]")


def test_outcomes_out_of_order_are_pooled_and_said() -> None:
    found = headroom(outcomes({1: [True] * 2, 2: [False, False], 4: [True, True], 8: [False] * 2}))
    levels = survival(outcomes({1: [True] * 2, 2: [False, False], 4: [True, True], 8: [False] * 2}))

    assert [level.share for level in levels] == [1.0, 0.5, 0.5, 0.0]
    assert found is not None
    assert not found.monotone
    assert found.value == 4.0


def test_failed_runs_say_nothing() -> None:
    levels = survival(outcomes({1: [True, None, True], 2: [None, None, None], 4: [False, None, False]}))

    assert [(level.rate, level.survived, level.runs) for level in levels] == [(1, 2, 2), (4, 0, 2)]
    assert headroom(outcomes({1: [None, None]})) is None


@pytest.mark.parametrize(
    ("values", "weights", "pooled"),
    [
        ([1, 0.5, 0], [1, 1, 1], [1, 0.5, 0]),
        ([0, 1], [1, 3], [0.75, 0.75]),
        ([1, 0.2, 0.4, 0.3, 0.9], [1, 1, 1, 1, 1], [1, 0.45, 0.45, 0.45, 0.45]),
    ],
)
def test_isotonic_regression_pools_what_rises(values: list[float], weights: list[float], pooled: list[float]) -> None:
    assert isotonic(values, weights) == pytest.approx(pooled)


def test_wilsons_interval_is_that_of_the_formula() -> None:
    # z = 1.96: 3 of 3 gives 3 / (3 + z^2) = 0.4385 to 1; 5 of 10 is symmetric about a half.
    assert wilson(3, 3, confidence=0.95) == pytest.approx((0.43850, 1.0), abs=1e-4)
    assert wilson(5, 10, confidence=0.95) == pytest.approx((0.23659, 0.76341), abs=1e-4)


def test_a_silenced_model_counts_as_lost_where_lower_rates_learn() -> None:
    made = [*outcomes({1: [True] * 3}), *outcomes({8: [True] * 3}, auc=0.505)]

    assert [o.survived for o in settled(made, min_auc=0.52)] == [True] * 3 + [False] * 3
    slow = [dataclasses.replace(o, auc=0.505) for o in made]
    assert all(o.survived for o in settled(slow, min_auc=0.52))


def run_search(threshold: float, search: Search = SEARCH, *, seeds: int = 2) -> tuple[list[Outcome], int]:
    """A model that survives up to a threshold, to its end."""
    found: list[Outcome] = []
    for rounds in range(100):
        rates = search.next_rates(found)
        if not rates:
            return found, rounds
        assert all(search.lowest <= rate <= search.highest for rate in rates)
        found += outcomes({rate: [rate <= threshold] * seeds for rate in rates})
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("threshold", [0.2, 0.9, 1.0, 5.7, 8.0, 63.0])
@pytest.mark.parametrize("points", [1, 3])
def test_the_search_brackets_any_threshold_within_the_tolerance(threshold: float, points: int) -> None:
    found, rounds = run_search(threshold, dataclasses.replace(SEARCH, points=points))

    estimate = headroom(found)
    assert estimate is not None
    assert estimate.low <= threshold < estimate.high <= 1.51 * estimate.low  # rates have three digits
    assert rounds <= 6


@pytest.mark.parametrize(("threshold", "told"), [(1000.0, ">= 64x"), (0.01, "< 0.125x")])
def test_the_search_ends_at_the_ends_of_its_range(threshold: float, told: str) -> None:
    found, _ = run_search(threshold)

    assert str(headroom(found)) == told


def test_where_seeds_disagree_at_an_end_the_search_looks_once_further() -> None:
    made = outcomes({0.125: [True, True, False], 0.18: [False] * 3, 1: [False] * 3})

    assert SEARCH.next_rates(made) == []  # 0.125x is as low as it may go
    lower = dataclasses.replace(SEARCH, lowest=0.01)
    assert lower.next_rates(made) == [0.0156]
    assert lower.next_rates([*made, *outcomes({0.0156: [True] * 3})]) == []
    upper = outcomes({1: [True] * 3, 2: [True] * 3, 2.9: [True, False, False]})
    assert SEARCH.next_rates(upper) == [23.2]


def test_rates_never_leave_the_range_by_rounding() -> None:
    assert dataclasses.replace(SEARCH, highest=4096.0).next_rates([]) == [1.0, 8.0, 64.0, 512.0, 4096.0]


def test_a_search_whose_runs_all_fail_ends() -> None:
    first = SEARCH.next_rates([])

    assert first == [1.0, 8.0, 64.0]
    found = outcomes({rate: [None] for rate in first})
    for _ in range(10):
        rates = SEARCH.next_rates(found)
        found += outcomes({rate: [None] for rate in rates})
    assert SEARCH.next_rates(found) == []


@pytest.mark.parametrize(("name", "value"), [("lowest", 2.0), ("highest", 0.5), ("step", 1.0), ("points", 0)])
def test_a_range_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match="headroom"):
        dataclasses.replace(SEARCH, **{name: value})
