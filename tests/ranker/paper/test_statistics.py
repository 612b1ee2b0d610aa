"""The statistics against cases done by hand and against published tables."""

from __future__ import annotations

import math

import pytest

from ranker.paper.statistics import clopper_pearson, paired_t, t_quantile, t_within


def test_none_or_all_of_n_has_an_interval_in_closed_form() -> None:
    # (1 - p)^n = 0.025 and p^n = 0.025
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1.0))


def test_one_of_two_solves_a_quadratic() -> None:
    # high: (1-p)^2 + 2p(1-p) = 1 - p^2 = 0.025; low: 1 - (1-p)^2 = 0.025
    assert clopper_pearson(1, 2) == pytest.approx((1 - math.sqrt(0.975), math.sqrt(0.975)))


def test_three_of_ten_is_as_in_published_tables() -> None:
    assert clopper_pearson(3, 10) == pytest.approx((0.0667, 0.6525), abs=1e-4)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="k of n"):
        clopper_pearson(k, n)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (29, 2.0452)],
)
def test_students_t_is_as_in_published_tables(freedom: int, t: float) -> None:
    assert t_within(t, freedom) == pytest.approx(0.95, abs=1e-5)
    assert t_quantile(0.95, freedom) == pytest.approx(t, abs=1e-4)


def test_a_paired_difference_by_hand() -> None:
    # d = 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom;
    # P(abs(T) <= t) = t / sqrt(2 + t^2) there.
    test = paired_t([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (test.difference, test.n) == (2.0, 3)
    assert test.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert test.interval == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)


def test_one_pair_has_a_difference_but_no_significance() -> None:
    test = paired_t([1.0], [0.5])
    assert test.difference == 0.5
    assert math.isnan(test.p)


def test_pairs_that_all_differ_alike_are_certain_and_equal_ones_are_not() -> None:
    assert paired_t([1.0, 2.0], [0.0, 1.0]).p == 0.0
    assert paired_t([1.0, 2.0], [1.0, 2.0]).p == 1.0
