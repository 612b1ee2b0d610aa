"""Skill over batches against numbers worked out by hand, and what counts as lost."""

from __future__ import annotations

import math

import pytest

from ranker.stability import DetectorSettings
from ranker.stability.skill import Skill, SkillWindow

NAN = math.nan
SETTINGS = DetectorSettings()


def window(*batches: tuple[float, float, float, float, float]) -> SkillWindow:
    """Batches of loss, AUC, positives, labels, variance at steps 1, 2, ..."""
    made = SkillWindow(100)
    for step, (loss, auc, positives, labels, variance) in enumerate(batches, start=1):
        made.add(step, loss=loss, auc=auc, positives=positives, labels=labels, variance=variance)
    return made


def test_auc_is_weighted_by_pairs_and_normalised_entropy_is_that_of_all_rows() -> None:
    found = window((0.5, 0.8, 2.0, 4.0, 0.25), (0.3, 0.6, 1.0, 10.0, 0.09), (0.1, NAN, 0.0, 6.0, 0.0)).between(1, 3)
    pairs = 2 * 2 / 4 + 1 * 9 / 10
    assert found.pairs == pytest.approx(pairs)
    assert found.auc == pytest.approx((0.8 * 1.0 + 0.6 * 0.9) / pairs)
    share = 3 / 20
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.relative_loss == pytest.approx((0.5 * 4 + 0.3 * 10 + 0.1 * 6) / 20 / entropy)


def test_a_regression_is_compared_with_the_variance_and_one_outlier_batch_does_not_decide() -> None:
    batches = [(1.0, NAN, 0.0, 50.0, 2.0)] * 15 + [(1e6, NAN, 0.0, 50.0, 2.0)]
    found = window(*batches).between(1, 16)
    assert found.relative_loss == 0.5
    assert math.isnan(found.auc)
    assert found.lost_fit(Skill(relative_loss=0.4)) is False
    assert Skill(relative_loss=1.2).lost_fit(found) is True


def test_only_the_batches_asked_for_count_and_those_without_labels_are_unknown() -> None:
    made = window((0.5, 0.9, 2.0, 4.0, 0.25), (0.5, 0.5, 2.0, 4.0, 0.25), (0.0, NAN, 0.0, 0.0, NAN))
    assert made.between(2, 3).auc == 0.5
    assert not made.between(3, 3).is_known
    again = SkillWindow(100)
    again.load_state_dict(made.state_dict())
    assert again.between(1, 2) == made.between(1, 2)


@pytest.mark.parametrize(
    ("before", "now", "pairs", "lost"),
    [
        (0.75, 0.68, 1e6, True),  # more than a fifth of 0.25
        (0.75, 0.71, 1e6, False),
        (0.75, 0.55, 20.0, False),  # a rare task: 0.2 is within three standard errors
        (0.75, 0.30, 20.0, True),
        (0.51, 0.49, 1e6, False),  # nothing was learned
        (NAN, 0.5, 1e6, False),
        (0.75, NAN, 1e6, False),
    ],
)
def test_an_auc_is_lost_beyond_its_share_and_its_noise(before: float, now: float, pairs: float, lost: bool) -> None:
    assert Skill(auc=now, pairs=pairs).lost_auc(Skill(auc=before, pairs=pairs), SETTINGS) is lost


def test_less_than_half_is_more_than_lost() -> None:
    before = Skill(auc=0.76, pairs=1e6)
    for now, lost, half in ((0.75, False, False), (0.68, True, False), (0.60, True, True), (NAN, False, False)):
        found = Skill(auc=now, pairs=1e6)
        assert (found.lost_auc(before, SETTINGS), found.lost_half_of_auc(before, SETTINGS)) == (lost, half)
