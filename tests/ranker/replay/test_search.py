"""Few questions find the few that matter."""

from __future__ import annotations

import pytest

from ranker.replay.search import halve, halve_questions, prefix_questions, smallest_prefix


@pytest.mark.parametrize("culprit", range(13))
def test_halving_finds_a_single_culprit_within_its_bound(culprit: int) -> None:
    asked: list[list[int]] = []

    def enough(part) -> bool:
        asked.append(list(part))
        return culprit in part

    assert halve(range(13), enough) == [culprit]
    assert len(asked) <= halve_questions(13)


def test_halving_keeps_two_that_are_needed_together_and_gives_up_where_no_half_helps() -> None:
    assert halve(range(8), lambda part: {0, 1} <= set(part)) == [0, 1]
    assert halve(range(8), lambda part: {0, 7} <= set(part)) == []


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 20])
def test_the_smallest_prefix_is_found_within_its_bound(needed: int) -> None:
    asked: list[int] = []

    def enough(k: int) -> bool:
        asked.append(k)
        return k >= needed

    assert smallest_prefix(20, enough) == needed
    assert len(asked) <= prefix_questions(20)


def test_no_prefix_is_none() -> None:
    assert smallest_prefix(20, lambda k: False) is None
