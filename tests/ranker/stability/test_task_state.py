"""The baseline of a loss follows its level and noise, and rejects spikes."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ranker.stability import DetectorSettings, DivergenceDetector
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


def test_positives_of_rare_tasks_are_no_event_where_the_heads_start_at_the_log_odds() -> None:
    """The first losses are those of batches without a positive, near 0. One positive multiplies them by 20."""
    rng = random.Random(0)
    rates = [0.45, 0.0013, 0.0026, 0.0174]
    detector = DivergenceDetector([f"t{r}" for r in rates])
    for step in range(1, 1001):
        ones = [sum(rng.random() < rate for _ in range(256)) if step > 1 else 0 for rate in rates]
        losses = [-(n * math.log(r) + (256 - n) * math.log(1 - r)) / 256 for n, r in zip(ones, rates, strict=True)]
        labels_T = torch.full([4], 256.0)
        detector.update(
            step,
            torch.tensor(losses),
            torch.tensor([0.7, 0.6, 0.6, 0.6]),
            torch.ones(4),
            positives_T=torch.tensor(ones, dtype=torch.float32),
            labels_T=labels_T,
        )
        assert detector.poll() == [], step
        assert not (detector.suspicion and detector.suspicion.kind == "full"), (step, detector.reason)
    assert detector.finish() == []
