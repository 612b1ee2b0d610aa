"""The baseline of a loss follows its level and noise, and rejects spikes."""

from __future__ import annotations

import pytest
import torch

from ranker.stability import DetectorSettings
from ranker.stability.task_state import Baseline

SETTINGS = DetectorSettings()


def noisy(level: float, steps: int, *, seed: int = 0, scale: float = 0.02) -> list[float]:
    g = torch.Generator().manual_seed(seed)
    return (level * (1 + scale * torch.randn(steps, generator=g))).tolist()


def fed(*parts: list[float]) -> Baseline:
    baseline = Baseline(SETTINGS)
    for part in parts:
        for loss in part:
            baseline.accept(loss)
    return baseline


def test_level_and_scale_are_those_of_the_noise() -> None:
    baseline = fed(noisy(0.6, 500))
    assert baseline.level == pytest.approx(0.6, rel=0.02)
    assert baseline.scale == pytest.approx(0.012, rel=0.4)


def test_outliers_do_not_enter() -> None:
    clean, dirty = noisy(0.6, 500), noisy(0.6, 500)
    dirty[100:500:10] = [50.0] * 40
    one, two = fed(clean), fed(dirty)
    assert two.level == pytest.approx(one.level, rel=0.01)
    assert two.scale < 2 * one.scale


def test_a_loss_that_falls_is_followed_within_a_few_steps() -> None:
    assert fed(noisy(8.0, 300), noisy(1.0, 20)).level == pytest.approx(1.0, rel=0.05)


def test_a_level_that_rises_a_little_for_good_is_followed_slowly() -> None:
    before = fed(noisy(1.0, 300), noisy(1.4, 60))
    after = fed(noisy(1.0, 300), noisy(1.4, 600))
    assert before.level == pytest.approx(1.0, rel=0.05)
    assert after.level == pytest.approx(1.4, rel=0.05)


@pytest.mark.parametrize(("rate", "steps"), [(0.01, 200), (0.003, 900)])
def test_a_loss_that_grows_faster_than_max_rise_gets_away_from_its_baseline(rate: float, steps: int) -> None:
    growing = [(1 + rate) ** k for k in range(steps)]
    baseline = fed(noisy(1.0, 300), growing)
    assert baseline.level < 1.01 * 2 ** (steps / SETTINGS.max_rise)
    assert baseline.median_excess(growing[-6]) > 1


def test_the_first_loss_sets_the_floor_for_rare_tasks() -> None:
    rare = [0.003] * 9 + [0.02]
    baseline = fed([0.69], rare * 40)
    assert baseline.excess(0.05) < 1 < baseline.excess(0.3)


def test_restart_takes_the_new_level_at_once() -> None:
    baseline = fed(noisy(1.0, 300))
    baseline.restart([3.0, 3.1, 2.9])
    assert baseline.level == 3.0


def test_the_buffer_keeps_its_sorted_copy_in_step() -> None:
    baseline = fed(noisy(1.0, 1000, scale=0.05))
    assert baseline._sorted == sorted(baseline._losses)
    assert len(baseline._losses) == SETTINGS.window
