"""The detector from outside: polling, saved state, settings, malformed input."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch

import signal_traces as traces
from ranker.errors import UserError
from ranker.stability import DetectorSettings, DivergenceDetector, Event
from signal_traces import TASKS, Trace, healthy
from support import plain

Judged = Callable[..., Any]


def feed(detector: DivergenceDetector, trace: Trace, start: int, stop: int) -> None:
    for i in range(start, stop):
        detector.update(i + 1, **trace.signals(i))


def eventful() -> Trace:
    trace = traces.spike(healthy(steps=900, seed=5), at=200, length=40, factor=20.0)
    trace = traces.not_a_number(trace, at=350, length=2)
    return traces.die(trace, at=700)


def test_the_verdict_does_not_depend_on_how_often_it_is_polled(judged: Judged) -> None:
    kept = [judged(eventful(), poll_every=n)[1] for n in (1, 7, 50)]
    assert kept[0] == kept[1] == kept[2]
    assert [e.kind for e in kept[0]] == ["micro", "micro", "full"]


def test_a_suspicion_has_the_first_step_of_the_event_it_becomes() -> None:
    detector, trace, begun = DivergenceDetector(TASKS), eventful(), {}
    for i in range(len(trace)):
        feed(detector, trace, i, i + 1)
        settled, suspicion = detector.poll(), detector.suspicion
        begun |= {i + 1: suspicion.step} if suspicion else {}
        for event in settled:
            assert begun[i] == event.step
            assert suspicion is None or event.kind == "full"
    assert min(begun) == 200
    assert 195 not in begun
    assert 300 not in begun


def test_a_blow_up_in_the_first_steps_stays_suspect_and_a_smaller_spike_there_does_not() -> None:
    for factor, kind in ((1000.0, "full"), (8.0, "shift")):
        trace, detector = (
            traces.spike(healthy(steps=30, seed=5), at=4, length=2, factor=factor),
            DivergenceDetector(TASKS),
        )
        feed(detector, trace, 0, 6)
        detector.poll()
        assert detector.suspicion is not None
        assert (detector.suspicion.step, detector.suspicion.kind) == (4, kind)
        feed(detector, trace, 6, len(trace))
        detector.poll()
        assert (detector.suspicion is not None) == (kind == "full")


@pytest.mark.parametrize("stop", [60, 215, 245, 352, 720])
def test_a_detector_restored_at_any_step_continues_as_the_original(stop: int) -> None:
    trace = eventful()
    whole, first, second = (DivergenceDetector(TASKS) for _ in range(3))
    feed(whole, trace, 0, len(trace))
    feed(first, trace, 0, stop)
    file = io.BytesIO()
    before = first.poll() if stop == 245 else []
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    feed(second, trace, stop, len(trace))

    assert before + second.finish() == whole.finish()
    assert (second.summary(), second.reason) == (whole.summary(), whole.reason)
    assert plain(second.state_dict()) == plain(whole.state_dict())


def test_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(UserError, match="checkpoint is of tasks"):
        DivergenceDetector(["a", "b"]).load_state_dict(DivergenceDetector(["a"]).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "patience must be a number above 0"),
        ({"jump_ratio": 0.5}, "jump_ratio must be at least 1"),
        ({"window": 4}, "window must be at least 16"),
        ({"dead_spread": True}, "dead_spread must be a number"),
        ({"auc_tolerance": "x"}, "auc_tolerance must be a number"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DivergenceDetector(TASKS, **settings)


def test_every_setting_is_an_argument_with_the_same_default() -> None:
    assert DivergenceDetector(TASKS).settings == DetectorSettings()
    for field in fields(DetectorSettings):
        changed = {field.name: 2 * asdict(DetectorSettings())[field.name]}
        assert getattr(DivergenceDetector(TASKS, **changed).settings, field.name) == changed[field.name]
    with pytest.raises(TypeError, match="patiance"):
        DivergenceDetector(TASKS, patiance=3)  # type: ignore[call-arg]


def test_losses_of_another_shape_and_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        DivergenceDetector(TASKS).update(1, torch.zeros(2))
    with pytest.raises(UserError, match="at least one task"):
        DivergenceDetector([])


def test_losses_alone_are_enough_for_jumps() -> None:
    trace = traces.spike(healthy(steps=400, seed=1), at=200, length=5, factor=10.0)
    detector = DivergenceDetector(TASKS)
    for i in range(len(trace)):
        detector.update(i + 1, trace.losses_NT[i])
    assert [(e.kind, e.step) for e in detector.finish()] == [("micro", 200)]


def test_steps_without_labels_of_a_task_are_ignored() -> None:
    trace = healthy(steps=600, seed=1)
    losses_NT = trace.losses_NT.clone()
    losses_NT[::2, 1] = 0.0
    detector = DivergenceDetector(TASKS)
    for i in range(len(trace)):
        detector.update(i + 1, losses_NT[i], trace.auc_NT[i], trace.spread_NT[i])
    assert detector.finish() == []


def test_a_single_task_jumping_far_in_a_single_step_is_seen() -> None:
    detector = DivergenceDetector(["only"])
    for step in range(1, 301):
        detector.update(step, torch.tensor([0.6 + 0.01 * math.sin(step) + (20.0 if step == 200 else 0.0)]))
    assert [(e.kind, e.step) for e in detector.finish()] == [("micro", 200)]


def test_events_are_returned_once_and_finish_without_steps_returns_none() -> None:
    assert DivergenceDetector(TASKS).finish() == []
    detector = DivergenceDetector(TASKS)
    feed(detector, eventful(), 0, 900)
    assert len(detector.poll()) == 3
    assert detector.poll() == []
    assert detector.finish() == []
    assert len(detector.events) == 3


def test_an_open_spike_is_reported_by_status_and_reason() -> None:
    detector = DivergenceDetector(TASKS)
    trace = eventful()
    feed(detector, trace, 0, 210)
    assert detector.poll() == []
    assert detector.status == "suspect"
    assert "at step 200" in detector.reason
    assert "has not come back" in detector.reason


def test_an_event_is_json_and_a_sentence(judged: Judged) -> None:
    event: Event = judged(eventful())[1][0]
    assert json.loads(json.dumps(event.to_dict()))["recovered_at"] == event.recovered_at
    assert str(event).startswith("the loss of ")


def test_many_unread_rows_are_classified_without_a_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranker.stability.detector._MAX_UNREAD_STEPS", 64)
    detector = DivergenceDetector(TASKS)
    feed(detector, eventful(), 0, 900)
    assert detector.status == "diverged"
    assert [e.kind for e in detector.poll()] == ["micro", "micro", "full"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_updates_do_not_wait_and_polls_are_one_call_behind() -> None:
    trace = eventful()
    detector = DivergenceDetector(TASKS, device="cuda")
    losses_NT, auc_NT, spread_NT = (x.cuda() for x in (trace.losses_NT, trace.auc_NT, trace.spread_NT))
    nonfinite_N = trace.nonfinite_N.cuda()
    events: list[Event] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(len(trace)):
            detector.update(i + 1, losses_NT[i], auc_NT[i], spread_NT[i], nonfinite_N[i])
            if i == 500:
                events += detector.poll()
                assert events == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [e.kind for e in events + detector.finish()] == ["micro", "micro", "full"]
