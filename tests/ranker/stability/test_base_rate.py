"""1x from short runs: the smallest rate that most runs do not survive, and what speaks against it."""

from __future__ import annotations

import math

import pytest

from ranker.errors import UserError
from ranker.stability.base_rate import base_rate
from ranker.stability.lr_headroom import Outcome


def outcomes(survivors: dict[float, int], *, aucs: dict[float, float] | None = None, seeds: int = 3) -> list[Outcome]:
    return [
        Outcome(rate=rate, seed=seed, survived=seed < kept, auc=(aucs or {}).get(rate, 0.7))
        for rate, kept in survivors.items()
        for seed in range(seeds)
    ]


def test_1x_is_the_smallest_rate_that_loses_most_runs():
    found = base_rate(outcomes({0.25: 3, 1: 3, 2: 2, 4: 1, 16: 0}))
    assert (found.multiple, found.doubts) == (4, ())
    assert "2 of 3 runs are lost there, most survive at 2" in found.reason


def test_where_nothing_is_lost_a_quarter_of_1x_is_the_best_rate_and_this_is_doubted():
    found = base_rate(outcomes({1: 3, 4: 3, 16: 3, 64: 3}, aucs={1: 0.6, 4: 0.71, 16: 0.7, 64: 0.65}))
    assert found.multiple == 16
    assert "did not diverge" in found.doubts[0]


def test_rates_that_survive_but_learn_little_are_doubted():
    found = base_rate(outcomes({0.25: 3, 1: 3, 4: 0}, aucs={0.25: 0.74, 1: 0.6}))
    assert found.multiple == 4
    assert found.doubts == ("at 1 of the present 1x naive Adagrad reaches 0.600 only, and 0.740 elsewhere",)
    (doubt,) = base_rate(outcomes({1: 3, 4: 0}, aucs={1: 0.51})).doubts
    assert "learns next to nothing" in doubt
    (doubt,) = base_rate(outcomes({1: 3, 4: 0}, aucs={1: math.nan})).doubts
    assert "no task has an AUC" in doubt


def test_what_tells_nothing_is_an_error():
    failed = [Outcome(rate=1, seed=0, survived=None)]
    with pytest.raises(UserError, match="every run failed"):
        base_rate(failed)
    with pytest.raises(UserError, match=r"lost even at 0\.25 of the present 1x"):
        base_rate(outcomes({0.25: 0, 1: 0}))
    with pytest.raises(UserError, match="no run is lost and none has an AUC"):
        base_rate(outcomes({1: 3}, aucs={1: math.nan}))
