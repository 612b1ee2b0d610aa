"""What decides between micro, full and unsettled once the loss is back: the skill, the step cut, the hold-out."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import signal_traces as traces
from ranker.errors import UserError
from ranker.stability import DivergenceDetector, Event
from signal_traces import TASKS, Trace, healthy
from support import plain

Judged = Callable[..., Any]
CUT = torch.tensor([400.0, 2.0, 0.9])


def lost_at(trace: Trace, at: int, *, length: int = 25, kept: float = 0.3, back_after: int | None = None) -> Trace:
    """A spike whose losses come back, after which AUCs keep a share of their distance from 0.5, or get it back."""
    spiked = traces.spike(trace, at=at, length=length, factor=1e4)
    until = len(trace) if back_after is None else at - 1 + back_after
    auc_NT, batch_auc_NT = spiked.auc_NT.clone(), spiked.batch_auc_NT.clone()
    batch_auc_NT[at - 1 : until] -= (1 - kept) * (trace.eval_auc_T - 0.5).nan_to_num()
    auc_NT[at - 1 : until] = 0.5 + kept * (auc_NT[at - 1 : until] - 0.5)
    held_out = trace.eval_auc_T if back_after is not None else 0.5 + kept * (trace.eval_auc_T - 0.5)
    return replace(spiked, auc_NT=auc_NT, batch_auc_NT=batch_auc_NT.clamp(0, 1), eval_auc_T=held_out)


def run(trace: Trace, *, cut_from: int | None = None, cut: torch.Tensor = CUT, **settings: float) -> list[Event]:
    """Events until the end or a full divergence, without a hold-out; the step cut is high from a step on."""
    detector = DivergenceDetector(TASKS, **settings)
    for i in range(len(trace)):
        healthy_cut = torch.tensor([1.01, 1.0, 0.0])
        is_cut = cut_from is not None and i + 1 >= cut_from
        detector.update(i + 1, **trace.signals(i), step_cut_3=cut if is_cut else healthy_cut)
        if detector.poll() and detector.status == "diverged":
            break
    return detector.events + (detector.finish() if detector.status != "diverged" else [])


def test_a_loss_that_comes_back_without_the_auc_is_full_within_the_bound() -> None:
    (event,) = run(lost_at(healthy(steps=1500, seed=1), 800))

    assert (event.kind, event.step) == ("full", 800)
    assert event.judged_at <= 800 + 25 + 250
    assert "the loss came back after" in event.reason
    assert "the AUC of click did not: 0.69" in event.reason
    assert "after 250 steps" in event.reason


def test_an_auc_that_comes_back_in_time_makes_it_micro() -> None:
    (event,) = run(lost_at(healthy(steps=1500, seed=1), 800, back_after=150))

    assert (event.kind, event.step) == ("micro", 800)
    assert 800 + 150 <= event.judged_at <= 800 + 150 + 60
    assert 18 <= event.length <= 27  # the length is that of the loss


def test_a_short_spike_that_harmed_nothing_is_micro_after_the_proof() -> None:
    (event,) = run(traces.spike(healthy(steps=1500, seed=1), at=800, length=2, factor=50.0))
    assert event.kind == "micro"
    assert event.judged_at == event.recovered_at + 50 - 1


def test_until_the_verdict_the_run_is_suspect_from_the_first_step_of_the_event() -> None:
    trace, detector = lost_at(healthy(steps=1500, seed=1), 800), DivergenceDetector(TASKS)
    for i in range(950):
        detector.update(i + 1, **trace.signals(i))
    assert detector.poll() == []
    assert detector.status == "suspect"
    assert "whether what was learned came back is not known yet" in detector.reason
    assert detector.suspicion is not None
    assert (detector.suspicion.step, detector.suspicion.kind) == (800, "full")


def test_a_second_spike_before_the_verdict_does_not_move_the_deadline() -> None:
    trace = lost_at(healthy(steps=1500, seed=1), 800)
    for at in (900, 980, 1040):
        trace = traces.spike(trace, at=at, length=5, factor=30.0)
    (event,) = run(trace)
    assert (event.kind, event.step) == ("full", 800)
    assert event.judged_at <= 1110  # 250 steps after the first, and the proof after the last


def test_the_depth_of_an_event_is_that_of_its_deepest_spike() -> None:
    trace = traces.spike(lost_at(healthy(steps=1500, seed=1), 800), at=900, length=5, factor=1e7)
    (event,) = run(trace)
    assert (event.kind, event.step) == ("full", 800)
    assert event.depth > 1e6
    assert "at step 800" in event.reason
    assert "at step 900" in event.reason


def test_spikes_that_harmed_nothing_in_one_probation_are_each_a_micro_event() -> None:
    trace = traces.spike(healthy(steps=1500, seed=1), at=800, length=5, factor=30.0)
    events = run(traces.spike(trace, at=830, length=5, factor=30.0))
    assert [(e.kind, e.step) for e in events] == [("micro", 800), ("micro", 830)]


def test_a_rare_task_that_happens_to_rank_badly_is_no_full_divergence() -> None:
    """Half a positive in a batch: an AUC over 50 batches says nothing."""
    trace = traces.spike(healthy(steps=1500, seed=1), at=800, length=5, factor=30.0)
    batch_auc_NT = trace.batch_auc_NT.clone()
    batch_auc_NT[799:1100, 2] = (batch_auc_NT[799:1100, 2] - 0.1).clamp(0, 1)
    assert [e.kind for e in run(replace(trace, batch_auc_NT=batch_auc_NT))] == ["micro"]


def test_a_regression_that_fits_no_better_than_a_constant_is_full() -> None:
    trace = traces.spike(healthy(steps=1500, seed=1), at=800, length=20, factor=50.0)
    variance_NT = trace.variance_NT.clone()
    variance_NT[:, 3] *= 0.1  # R2 is 0.5 before
    losses_NT = trace.losses_NT.clone()
    losses_NT[819:, 3] *= 2.1
    (event,) = run(replace(trace, variance_NT=variance_NT, losses_NT=losses_NT), jump_ratio=2.5, lost_ratio=3.0)
    assert event.kind == "full"
    assert "the loss of watch_time" in event.reason


def test_the_step_cut_calls_a_lost_model_within_tens_of_steps() -> None:
    for seed in range(5):
        trace = lost_at(healthy(steps=1500, seed=seed), 800)
        (event,) = run(trace, cut_from=803)
        assert (event.kind, event.step) == ("full", 800)
        assert event.judged_at - event.step <= 20
        assert "was cut 400 times and the AUC of click fell" in event.reason


@pytest.mark.parametrize("cut", [torch.tensor([100.0, 100.0, 1.0]), torch.full((3,), math.nan)], ids=str)
def test_without_a_large_cut_nothing_is_called_fast(cut: torch.Tensor) -> None:
    (event,) = run(lost_at(healthy(steps=1500, seed=1), 800, back_after=60), cut_from=800, cut=cut)
    assert event.kind == "micro"


def test_a_large_cut_alone_is_no_verdict() -> None:
    assert run(healthy(steps=1500, seed=1), cut_from=800) == []
    (event,) = run(traces.spike(healthy(steps=1500, seed=1), at=800, length=20, factor=1e4), cut_from=800)
    assert event.kind == "micro"


def test_a_run_that_ends_before_the_verdict_is_unsettled_unless_the_hold_out_shows_it(judged: Judged) -> None:
    short = lost_at(healthy(steps=860, seed=1), 800)
    for kept, kind in ((0.2, "full"), (0.7, "unsettled"), (1.0, "micro")):
        held_out = 0.5 + kept * (healthy(steps=2, seed=1).eval_auc_T - 0.5)
        detector, (event,) = judged(replace(short, eval_auc_T=held_out))
        assert (event.kind, event.step) == (kind, 800)
        assert detector.summary()["unsettled"] == (kind == "unsettled")
        assert (detector.status == "diverged") == (kind == "full")
    detector, (event,) = judged(short, held_out=False)
    assert event.kind == "unsettled"
    assert "training ended before it was known" in event.reason
    assert event.recovered_at is not None


def test_a_spike_in_the_last_steps_is_unsettled_and_one_of_two_steps_is_nothing(judged: Judged) -> None:
    late = traces.spike(healthy(steps=503, seed=1), at=500, length=30, factor=100.0)
    detector, (event,) = judged(late, held_out=False)
    assert (event.kind, event.step, event.recovered_at) == ("unsettled", 500, None)
    assert detector.status != "diverged"
    tiny = healthy(steps=2, seed=1)
    tiny.losses_NT[1] *= 4
    assert judged(tiny, held_out=False)[1] == []


def test_a_level_beyond_a_blow_up_is_never_a_shift(judged: Judged) -> None:
    trace = healthy(steps=1500, seed=1)
    losses_NT = trace.losses_NT.clone()
    losses_NT[499:, 3] *= 4.0
    losses_NT[499:510, 3] *= 1e4
    _, events = judged(replace(trace, losses_NT=losses_NT))
    assert [(e.kind, e.step) for e in events] == [("full", 500)]


def test_a_new_level_worse_than_a_constant_or_with_lost_aucs_is_no_shift(judged: Judged) -> None:
    trace = healthy(steps=1500, seed=1)
    losses_NT = trace.losses_NT.clone()
    losses_NT[499:, 3] *= 4.0
    shifted = replace(trace, losses_NT=losses_NT)
    assert [e.kind for e in judged(shifted)[1]] == ["shift"]
    variance_NT = trace.variance_NT.clone()
    variance_NT[:, 3] *= 0.1
    _, (event,) = judged(replace(shifted, variance_NT=variance_NT))
    assert event.kind == "full"
    batch_auc_NT = trace.batch_auc_NT.clone()
    batch_auc_NT[499:, 0] -= 0.12
    _, (event,) = judged(replace(shifted, batch_auc_NT=batch_auc_NT))
    assert event.kind == "full"
    assert "the AUC of click" in event.reason


def test_one_label_carries_no_event_and_the_same_loss_of_many_does() -> None:
    """A task that is observed once in a batch: its loss is 10 times as high there in one batch."""
    for labels, kinds in ((1.0, []), (1024.0, ["micro"])):
        detector = DivergenceDetector(["only"])
        for step in range(1, 601):
            high = step == 300
            detector.update(
                step,
                torch.tensor([8.0 if high else 0.6 + 0.01 * math.sin(step)]),
                labels_T=torch.tensor([labels]),
            )
        assert [e.kind for e in detector.finish()] == kinds


def test_a_spike_without_depth_or_length_is_no_event() -> None:
    """A median that rises by a little opens a spike at a step whose own loss is low already."""
    for seed in range(5):
        trace = healthy(steps=900, seed=seed)
        losses_NT = trace.losses_NT.clone()
        losses_NT[600:606] *= torch.linspace(1.0, 1.35, 6)[:, None]
        events = run(replace(trace, losses_NT=losses_NT))
        assert all(e.depth >= 1.5 and e.length >= 1 for e in events)


@pytest.mark.parametrize("stop", [790, 806, 840, 900, 1040])
def test_a_detector_restored_during_spike_or_probation_continues_as_the_original(stop: int) -> None:
    trace = lost_at(healthy(steps=1300, seed=1), 800)
    whole, first, second = (DivergenceDetector(TASKS) for _ in range(3))
    for i in range(len(trace)):
        whole.update(i + 1, **trace.signals(i), step_cut_3=torch.tensor([2.0, 1.0, 0.0]))
        (first if i < stop else second).update(i + 1, **trace.signals(i), step_cut_3=torch.tensor([2.0, 1.0, 0.0]))
        if i == stop - 1:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
    assert second.finish() == whole.finish()
    assert second.status == "diverged"
    assert plain(second.state_dict()) == plain(whole.state_dict())


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="lost_share must be at most 1"):
        DivergenceDetector(TASKS, lost_share=1.5)
    with pytest.raises(UserError, match="proof_steps must be at most recovery_steps"):
        DivergenceDetector(TASKS, proof_steps=60, recovery_steps=50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_spikes_that_harm_nothing_have_no_full_verdict_in_30000_steps(seed: int) -> None:
    trace = healthy(steps=30_000, seed=200 + seed)
    for at in range(500, 30_000, 500):
        trace = traces.spike(trace, at=at, length=1 + at % 37, factor=40.0)
    events = run(trace, cut_from=1)
    assert {e.kind for e in events} == {"micro"}


def test_a_run_that_ends_in_a_startup_spike_but_ranks_the_hold_out_is_not_lost() -> None:
    trace = traces.spike(healthy(steps=60, seed=1), at=3, length=58, factor=5.0)
    detector = DivergenceDetector(TASKS)
    for i in range(len(trace)):
        detector.update(i + 1, **trace.signals(i))
    detector.poll()

    events = detector.finish([0.62 if not math.isnan(float(auc)) else math.nan for auc in trace.eval_auc_T])

    assert [event.kind for event in events if event.kind == "full"] == []
    assert detector.status != "diverged"
