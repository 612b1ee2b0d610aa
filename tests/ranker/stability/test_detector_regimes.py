"""The detector on generated traces with known events, for every regime of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import signal_traces as traces
from ranker.stability import DivergenceDetector
from signal_traces import TASKS, healthy

Judged = Callable[..., Any]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [60, 200, 450, 2000])
def test_a_healthy_noisy_run_of_any_length_has_no_events(judged: Judged, seed: int, steps: int) -> None:
    detector, events = judged(healthy(steps=steps, seed=seed))
    assert events == []
    assert detector.status == "healthy"
    assert detector.reason == ""
    assert detector.summary() == {"micro": 0, "full": False, "unsettled": 0, "first_step": None}


@pytest.mark.parametrize("length", [1, 2, 5, 20, 100, 300])
@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_a_spike_is_one_micro_divergence_with_its_length_and_depth(judged: Judged, length: int, factor: float) -> None:
    trace = traces.spike(healthy(steps=1000, seed=1), at=400, length=length, factor=factor)
    detector, (event,) = judged(trace)
    assert event.kind == "micro"
    assert event.step == 400
    assert 0.6 * length <= event.length <= length + 2
    assert event.recovered_at == event.step + event.length
    assert factor / 2 < event.depth < 5 * factor
    assert detector.status == "healthy"
    assert detector.summary() == {"micro": 1, "full": False, "unsettled": 0, "first_step": 400}


def test_a_spike_while_recovering_is_never_stopped(judged: Judged) -> None:
    trace = traces.spike(healthy(steps=390, seed=1), at=100, length=290, factor=1000.0)
    detector, _ = judged(trace, held_out=False)
    assert detector.status != "diverged"


def test_one_row_far_out_in_one_task_is_no_event_until_it_lasts(judged: Judged) -> None:
    trace = healthy(steps=600, seed=1)
    for length, number in ((1, 0), (2, 0), (3, 1), (10, 1)):
        far_out = traces.spike(trace, at=300, length=length, factor=70.0, tasks=slice(3, 4))
        far_out.losses_NT[299 : 299 + length, 3] = 140.0
        _, events = judged(far_out)
        assert [e.step for e in events] == [300] * number


def test_one_task_that_blows_up_in_one_early_step_is_remembered_where_nothing_is_learned(judged: Judged) -> None:
    lost, sound = (healthy(steps=205, seed=1, skill=skill) for skill in (0.0, 1.0))
    for trace in (lost, sound):
        trace.losses_NT[1, 3] = 1e4
    assert judged(lost)[0].summary() == {"micro": 0, "full": True, "unsettled": 0, "first_step": 2}
    assert judged(sound)[0].status == "healthy"


def test_spikes_far_apart_are_two_and_close_together_are_one(judged: Judged) -> None:
    for gap, number in ((100, 2), (4, 1)):
        trace = traces.spike(healthy(steps=600, seed=2), at=300, length=2, factor=10.0)
        trace = traces.spike(trace, at=302 + gap, length=2, factor=10.0)
        assert judged(trace)[0].summary()["micro"] == number


def test_the_task_that_moved_first_is_named(judged: Judged) -> None:
    trace = traces.spike(healthy(steps=600, seed=3), at=300, length=40, factor=3.0, tasks=slice(3, 4))
    trace = traces.spike(trace, at=304, length=40, factor=50.0, tasks=slice(0, 3))
    _, (event,) = judged(trace)
    assert (event.task, event.step) == ("watch_time", 300)
    assert "task watch_time moved first" in event.reason
    assert "the loss of follow" in event.reason or "the loss of click" in event.reason or "of like" in event.reason


def test_one_step_of_nan_is_micro(judged: Judged) -> None:
    detector, (event,) = judged(traces.not_a_number(healthy(steps=600, seed=1), at=300, length=1))
    assert (event.kind, event.step, event.recovered_at) == ("micro", 300, 301)
    assert event.to_dict()["depth"] is None
    assert "nan" in event.reason
    assert detector.status == "healthy"


def test_a_detector_that_saw_nan_is_not_blind_afterwards(judged: Judged) -> None:
    trace = traces.not_a_number(healthy(steps=600, seed=1), at=300, length=3)
    _, events = judged(traces.spike(trace, at=400, length=5, factor=10.0))
    assert [e.step for e in events] == [300, 400]


def test_nan_for_good_is_full_at_once(judged: Judged) -> None:
    detector, (event,) = judged(traces.not_a_number(healthy(steps=600, seed=1), at=300, length=300))
    assert (event.kind, event.step) == ("full", 300)
    assert event.judged_at <= 330
    assert "infinite or nan" in detector.reason


@pytest.mark.parametrize("at", [1, 2, 30])
def test_nan_from_the_start_is_full(judged: Judged, at: int) -> None:
    detector, (event,) = judged(traces.not_a_number(healthy(steps=100, seed=1), at=at, length=100))
    assert detector.status == "diverged"
    assert event.step == at


@pytest.mark.parametrize("rate", [0.003, 0.005, 0.01, 0.03, 0.1, 1.0])
def test_a_slow_blow_up_is_full(judged: Judged, rate: float) -> None:
    detector, events = judged(traces.blow_up(healthy(steps=3000, seed=1), at=500, rate=rate))
    assert detector.status == "diverged"
    assert events[-1].kind == "full"
    assert 500 <= events[-1].step <= 500 + 2 / rate
    assert detector.summary()["micro"] == 0


@pytest.mark.parametrize("factor", [3.5, 10.0, 1000.0])
def test_losses_high_for_good_are_full(judged: Judged, factor: float) -> None:
    detector, (event,) = judged(traces.step_up(healthy(steps=1200, seed=1), at=500, factor=factor))
    assert (event.kind, event.step) == ("full", 500)
    assert "has not come back" in detector.reason or "back at 0.5" in detector.reason


def test_one_loss_on_a_new_level_while_the_rest_is_well_is_a_shift(judged: Judged) -> None:
    trace = healthy(steps=1500, seed=1)
    losses_NT = trace.losses_NT.clone()
    losses_NT[499:, 3] *= 4.0
    detector, (event,) = judged(replace(trace, losses_NT=losses_NT))
    assert (event.kind, event.task, event.recovered_at) == ("shift", "watch_time", None)
    assert detector.status == "healthy"
    assert detector.summary() == {"micro": 0, "full": False, "unsettled": 0, "first_step": None}
    assert judged(traces.spike(replace(trace, losses_NT=losses_NT), at=1200, length=5, factor=10.0))[0].summary() == {
        "micro": 1,
        "full": False,
        "unsettled": 0,
        "first_step": 1200,
    }


def test_the_wild_first_steps_of_a_run_that_settles_are_no_event(judged: Judged) -> None:
    for wild in (10, 30, 50, 120):
        detector, events = judged(healthy(steps=450, seed=wild, wild=wild))
        assert (detector.status, events) == ("healthy", [])


@pytest.mark.parametrize("held_out", [False, True])
def test_constant_predictions_after_a_wild_start_are_full_from_the_start(judged: Judged, held_out: bool) -> None:
    trace = traces.die(healthy(steps=450, seed=1, wild=30, skill=0.0), at=25)
    detector, (event,) = judged(trace, held_out=held_out)
    assert detector.status == "diverged"
    assert event.step <= 3
    assert event.judged_at <= 100
    assert "no longer depend on the input since step 25" in detector.reason.replace(
        " (each task gives every row the same)", ""
    )


def test_an_early_death_is_seen_although_the_loss_looks_healthy(judged: Judged) -> None:
    detector, (event,) = judged(traces.die(healthy(steps=450, seed=1), at=120))
    assert (event.kind, event.step) == ("full", 120)
    assert event.judged_at < 190
    assert "depend on the input" in detector.reason


def test_a_run_that_ends_soon_after_it_died_gets_its_verdict_at_the_end(judged: Judged) -> None:
    _, (event,) = judged(traces.die(healthy(steps=210, seed=1), at=190))
    assert (event.kind, event.step, event.judged_at) == ("full", 190, 210)


def test_a_blow_up_with_varying_predictions_that_learns_nothing_is_full(judged: Judged) -> None:
    """The state that most lost models of the recorded runs are in: logits vary, AUCs stay at 0.5."""
    trace = healthy(steps=450, seed=1, wild=30, skill=0.0)
    detector, (event,) = judged(trace)
    assert event.kind == "full"
    assert event.step == 2
    assert event.judged_at <= 260
    assert "no task was learned" in detector.reason


def test_the_same_in_a_run_of_200_steps_is_told_at_the_end(judged: Judged) -> None:
    _, (event,) = judged(healthy(steps=205, seed=1, wild=30, skill=0.0))
    assert (event.kind, event.step, event.judged_at) == ("full", 2, 205)


def test_the_first_step_is_that_of_the_earliest_divergence_in_whatever_order_they_are_settled(judged: Judged) -> None:
    trace = traces.spike(healthy(steps=450, seed=1, wild=30, skill=0.0), at=120, length=10, factor=20.0)
    detector, events = judged(trace)
    assert [(e.kind, e.step) for e in events] == [("micro", 120), ("full", 2)]
    assert detector.summary() == {"micro": 1, "full": True, "unsettled": 0, "first_step": 2}


def test_tasks_that_cannot_be_learned_are_no_alarm_while_predictions_vary(judged: Judged) -> None:
    trace = healthy(steps=3000, seed=1, skill=0.0)
    assert judged(trace)[0].status == "healthy"


def test_one_learned_task_among_unlearnable_ones_is_enough_even_after_a_blow_up(judged: Judged) -> None:
    trace = healthy(steps=1000, seed=1, wild=30, skill=0.0)
    auc_NT, eval_auc_T = trace.auc_NT.clone(), trace.eval_auc_T.clone()
    auc_NT[100:, 1] = 0.68
    eval_auc_T[1] = 0.68
    assert judged(replace(trace, auc_NT=auc_NT, eval_auc_T=eval_auc_T))[0].status == "healthy"


def test_an_auc_that_falls_to_a_half_for_good_is_full_with_a_finite_loss(judged: Judged) -> None:
    detector, (event,) = judged(traces.forget(healthy(steps=2000, seed=1), at=800))
    assert event.kind == "full"
    assert 800 <= event.step <= 900
    assert "AUC is back at 0.5" in detector.reason


def test_an_auc_that_dips_and_returns_is_no_event(judged: Judged) -> None:
    trace = healthy(steps=1500, seed=1)
    dipped = traces.forget(trace, at=800).auc_NT
    auc_NT = torch.cat([dipped[:950], trace.auc_NT[950:]])
    detector, events = judged(replace(trace, auc_NT=auc_NT))
    assert (detector.status, events) == ("healthy", [])


def test_a_collapse_after_a_spike_dates_from_the_spike(judged: Judged) -> None:
    trace = traces.spike(traces.forget(healthy(steps=1500, seed=1), at=800), at=800, length=20, factor=30.0)
    _, (event,) = judged(trace)
    assert (event.kind, event.step) == ("full", 800)


def test_rare_tasks_without_skill_do_not_hide_a_lost_model(judged: Judged) -> None:
    trace = traces.forget(healthy(steps=1500, seed=1), at=600)
    auc_NT = trace.auc_NT.clone()
    auc_NT[:, 2] = 0.62  # by chance
    assert judged(replace(trace, auc_NT=auc_NT))[0].status == "diverged"


def test_drifting_levels_are_no_divergence(judged: Judged) -> None:
    for seed in range(3):
        detector, events = judged(healthy(steps=6000, seed=seed, drift=0.5))
        assert (detector.status, events) == ("healthy", [])


def test_still_high_at_the_end_is_full_unless_the_hold_out_is_ranked_well(judged: Judged) -> None:
    trace = healthy(steps=450, seed=1)
    losses_NT = trace.losses_NT.clone()
    losses_NT[399:] *= 5.0
    high = replace(trace, losses_NT=losses_NT)
    detector, (event,) = judged(high, held_out=False)
    assert (detector.status, event.kind, event.step) == ("diverged", "full", 400)
    detector, (event,) = judged(high)
    assert (detector.status, event.kind, event.recovered_at) == ("healthy", "micro", None)


def test_a_slow_model_that_never_blew_up_is_not_lost(judged: Judged) -> None:
    assert judged(healthy(steps=450, seed=1, learned_after=50_000))[0].status == "healthy"


def test_a_model_without_auc_and_worse_than_the_base_rate_on_the_hold_out_is_lost() -> None:
    def verdict(*, aucs: list[float], nes: list[float], steps: int = 205) -> str:
        detector = DivergenceDetector(["click", "like", "watch_time"])
        for step, losses in enumerate(healthy(steps=steps, seed=1).losses_NT[:, :3], start=1):
            detector.update(step, losses)
        detector.finish(eval_auc_T=aucs, eval_ne_T=nes)
        return detector.status

    nan = float("nan")
    assert verdict(aucs=[0.48, 0.49, nan], nes=[8.1, 12.8, nan]) == "diverged"
    assert verdict(aucs=[0.66, 0.61, nan], nes=[8.1, 12.8, nan]) == "healthy"  # badly calibrated, but it ranks
    assert verdict(aucs=[0.48, 0.49, nan], nes=[1.0, 1.0, nan]) == "healthy"  # slow, for all we know
    assert verdict(aucs=[0.48, 0.49, nan], nes=[8.1, 12.8, nan], steps=20) == "healthy"  # nothing can be said yet


def test_regressions_alone_can_be_judged_too(judged: Judged) -> None:
    for trace, status in (
        (healthy(steps=800, seed=1), "healthy"),
        (traces.step_up(healthy(steps=800, seed=1), at=300, factor=50.0), "diverged"),
        (traces.die(healthy(steps=800, seed=1), at=300), "diverged"),
    ):
        nothing = torch.full_like(trace.auc_NT, float("nan"))
        blind = replace(trace, auc_NT=nothing, eval_auc_T=nothing[0])
        assert judged(blind)[0].status == status


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_100000_healthy_steps_give_no_false_alarm(judged: Judged, seed: int) -> None:
    _, events = judged(healthy(steps=100_000, seed=100 + seed))
    assert events == []


def test_a_later_larger_spike_of_a_run_that_never_learned_is_in_its_event(judged: Judged) -> None:
    trace = traces.spike(healthy(steps=450, seed=1, wild=30, skill=0.0), at=120, length=10, factor=1e5)
    _, (later, full) = judged(trace)
    assert (later.kind, later.step, full.kind, full.step) == ("micro", 120, "full", 2)
    assert full.depth == later.depth >= 1e5
    assert full.reason.count("jumped to") == 2
    assert "at step 120" in full.reason

    halfway = DivergenceDetector(TASKS)
    for i in range(180):
        halfway.update(i + 1, **trace.signals(i))
    halfway.poll()
    assert halfway.suspicion is not None
    assert (halfway.suspicion.step, halfway.suspicion.depth) == (2, later.depth)

    restored = DivergenceDetector(TASKS)
    restored.load_state_dict(halfway.state_dict())
    for i in range(180, len(trace)):
        restored.update(i + 1, **trace.signals(i))
    assert restored.poll()[-1] == full
