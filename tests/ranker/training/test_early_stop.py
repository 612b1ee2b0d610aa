"""Which windows early stopping counts after a rollback, and after a resume."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ranker.training.early_stop import EarlyStop


def look(stop: EarlyStop, step: int, loss: float) -> bool:
    """A window was scored with this relative loss when the run was about to make a step."""
    task = SimpleNamespace(name="click")
    module = SimpleNamespace(last_progressive=(0, {"click/ne": loss}), schema=SimpleNamespace(tasks=[task]))
    fit: Any = SimpleNamespace(step=step, module=module)
    ended = stop.after_step(fit, ring=None, detector=None, say=lambda *_, **__: None)
    assert ended or not stop.after_step(fit, ring=None, detector=None, say=print), "a window counts once"
    return ended


def with_good_ones() -> EarlyStop:
    stop = EarlyStop(patience=2, min_windows=3)
    for step in (1, 11, 21):
        assert not look(stop, step, 0.8)
    return stop


def test_windows_that_a_rollback_has_undone_do_not_count() -> None:
    stop = with_good_ones()
    assert not look(stop, 31, 5.0)
    stop.forget_after(30)
    assert not look(stop, 41, 0.8)  # the same window again
    assert not look(stop, 51, 5.0)
    stop.forget_after(51)
    assert look(stop, 61, 5.0), "two in a row, of which neither was undone"


def test_a_resumed_run_goes_on_counting() -> None:
    stop = with_good_ones()
    assert not look(stop, 31, 5.0)
    for state in (stop.state_dict(), {"good": [0.8] * 3, "bad": [(30, 5.0)], "window": 3}):  # the latter is older
        again = EarlyStop(patience=2, min_windows=3)
        again.load_state_dict(state)
        assert look(again, 41, 5.0)
