from __future__ import annotations

import math
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ranker import config
from ranker.errors import UserError
from ranker.runs import objective
from support import ROOT


def summary(status: str = "completed", **metrics: float | None) -> dict[str, Any]:
    return {"status": status, "metrics": {f"test/click/{name}": value for name, value in metrics.items()}}


def test_a_lost_run_is_worse_than_every_finite_value_in_either_direction() -> None:
    for metric, good, bad in (
        ("auc", 0.8, 0.0),
        ("r2", 0.3, -1e9),
        ("rmse", 1.0, 1e9),
        ("logloss", 0.1, 1e9),
        ("ne", 0.8, 1e9),
    ):
        name = f"test/click/{metric}"
        values = [objective.value_of(summary(**{metric: value}), name) for value in (good, bad)]
        lost = objective.value_of(summary("diverged", **{metric: good}), name)
        best = max if objective.direction(name) == "maximize" else min
        assert best(values) == good
        assert best(*values, lost) == good
        assert best(bad, lost) == bad != lost
        assert objective.better(good, bad, name)


def test_an_unknown_or_undefined_objective_is_an_error_and_no_number() -> None:
    with pytest.raises(UserError, match="did you mean 'test/click/auc'"):
        objective.value_of(summary(auc=0.7), "test/clik/auc")
    with pytest.raises(UserError, match="test/click/auc is undefined on this hold-out"):
        objective.value_of(summary(auc=None), "test/click/auc")
    with pytest.raises(UserError, match="'calibration' has no better or worse"):
        objective.value_of(summary(calibration=1.0), "test/click/calibration")


def test_without_one_the_first_auc_counts_where_there_is_one() -> None:
    assert objective.value_of(summary(ne=0.9, auc=0.7), None) == 0.7
    assert math.isnan(objective.value_of(summary(rmse=0.7), None))


@pytest.mark.parametrize(
    ("name", "direction"), [("null", "maximize"), ("test/watch/rmse", "minimize"), ("test/watch/r2", "maximize")]
)
def test_the_search_goes_where_the_objective_is_better(name: str, direction: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["hparams_search=optuna", f"objective={name}"]
        cfg = compose("config", overrides=words, return_hydra_config=True)

    assert cfg.hydra.sweeper.direction == direction


def test_metrics_by_group_and_by_k_have_the_direction_of_their_kind() -> None:
    more = ["click/gauc.user", "click/ndcg_10.session", "watch/mae_raw", "click/ne.tab", "click/gauc_rows.user"]
    known = objective.metrics_of({"click": "binary"}, more=more)
    assert known[3:] == [f"test/{name}" for name in more[:4]]  # a share of rows is no quality
    assert [objective.direction(name) for name in known[3:]] == ["maximize", "maximize", "minimize", "minimize"]
    assert objective.chosen("test/click/gauc.user", known) == "test/click/gauc.user"
    with pytest.raises(UserError, match="'gauc_rows' has no better or worse"):
        objective.direction("test/click/gauc_rows.user")
