"""The searches find small sets of causes within their bound on the number of questions."""

from __future__ import annotations

import pytest

from ranker.replay.counterfactuals import find_sufficient_prefix, find_sufficient_subset, max_questions


@pytest.mark.parametrize("culprit", range(13))
def test_halving_finds_a_single_culprit_within_its_bound(culprit: int) -> None:
    asked: list[list[int]] = []

    def enough(part) -> bool:
        asked.append(list(part))
        return culprit in part

    assert find_sufficient_subset(range(13), enough) == [culprit]
    assert len(asked) <= max_questions(13)


def test_halving_keeps_two_that_are_needed_together_and_gives_up_where_no_half_helps() -> None:
    assert find_sufficient_subset(range(8), lambda part: {0, 1} <= set(part)) == [0, 1]
    assert find_sufficient_subset(range(8), lambda part: {0, 7} <= set(part)) == []


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 20])
def test_the_smallest_prefix_is_found_within_its_bound(needed: int) -> None:
    asked: list[int] = []

    def enough(k: int) -> bool:
        asked.append(k)
        return k >= needed

    assert find_sufficient_prefix(20, enough) == needed
    assert len(asked) <= max_questions(20)


def test_no_prefix_is_none() -> None:
    assert find_sufficient_prefix(20, lambda k: False) is None
