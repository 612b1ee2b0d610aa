"""The stability callback in a real fit: it works with any of its parts missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ranker.errors import UserError
from ranker.training.capsule_writer import CapsuleWriter
from ranker.training.module import RankingModule
from ranker.training.rollback import Rollback
from ranker.training.snapshots import SnapshotRing
from ranker.training.stability_callback import DivergenceWatch, Stability


@pytest.mark.parametrize("names", [(), ("snapshots",), ("capsules",), ("divergence",), ("divergence", "capsules")])
def test_parts_may_be_missing(fit: Callable[..., object], names: tuple[str, ...]) -> None:
    made = {"divergence": DivergenceWatch(), "snapshots": SnapshotRing(every=0), "capsules": CapsuleWriter()}
    stability = Stability(**{name: made[name] for name in names})

    fit(stability=stability)

    assert (stability.detector is not None) == ("divergence" in names)
    assert stability.rollbacks == []


@pytest.mark.parametrize(
    "others",
    [{}, {"divergence": DivergenceWatch()}, {"divergence": DivergenceWatch(), "snapshots": SnapshotRing(every=0)}],
)
def test_a_rollback_without_what_it_needs_is_refused(others: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"needs callbacks.divergence, and callbacks.snapshots"):
        Stability(rollback=Rollback(tries=1), **others)  # type: ignore[arg-type]
    Stability(rollback=Rollback(tries=0), **others)  # type: ignore[arg-type]


def test_an_unknown_detector_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="no setting 'patiance'; did you mean 'patience'"):
        DivergenceWatch(settings={"patiance": 3})
    with pytest.raises(UserError, match="window must be at least 16"):
        DivergenceWatch(settings={"window": 3})


def test_the_step_cut_of_every_shared_layer_is_recorded(
    fit: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict[str, list[float]] = {}

    def record(_module: object, values: dict[str, float], **_: object) -> None:
        for name, value in values.items():
            recorded.setdefault(name, []).append(value)

    monkeypatch.setattr(RankingModule, "record", record)
    stability = Stability(divergence=DivergenceWatch())
    fit(stability=stability)

    cuts = {name: values for name, values in recorded.items() if "step_cut" in name}
    assert set(cuts) == {
        f"signs/{layer}/{sign}" for layer in ("bottom_first", "bottom_top") for sign in ("step_cut", "step_cut_grown")
    }
    assert all(len(values) == 4 for values in cuts.values())  # steps 10, 20, 30, 40
    assert all(value >= 1.0 for value in cuts["signs/bottom_first/step_cut"])
    assert stability.detector is not None
    assert stability.detector.state_dict()["step_cut"]["count"] == 48
