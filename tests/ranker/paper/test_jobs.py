"""The jobs of every study compose to valid configurations of train.py."""

from __future__ import annotations

import polars as pl
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ranker import config
from ranker.paper.divergence_tables import mitigation_jobs, table3_rows
from ranker.paper.jobs import DATA, QUICK, Job, Setting, grid
from ranker.paper.published import STUDIES
from ranker.paper.search import METHODS, first_points
from ranker.paper.store import identity, unique
from support import ROOT


def all_jobs(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Job]]:
    """By phase; as if the search had chosen the first combination everywhere."""
    models = ("small", "large", "large_dcn", "moe", "ple")
    chosen = {(model, method): first_points(method, 1)[0] for model in models for method in METHODS}
    for module in ("table2.choose", "table2.choices", "curve_figures.choices"):
        monkeypatch.setattr(f"ranker.paper.{module}", lambda *_, **__: chosen)
    searched = pl.DataFrame({"status": ["completed"]})
    none = {f"{study}_search": searched for study in ("table2", "table2_soft")}
    none["midrun_naive"] = pl.DataFrame({"model": ["small"], "lr_mult": [1.0], "seed": [2]})
    return {phase.name: phase.jobs(setting, none) for study in STUDIES for phase in study.phases}


@pytest.mark.parametrize(("name", "phases"), [("kuairand", None), ("synthetic", ("table2_search", "table3"))])
def test_jobs_compose_to_legal_configurations(
    name: str, phases: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = all_jobs(Setting(DATA[name], extra=("data.source=/nowhere",) if name == "kuairand" else ()), monkeypatch)
    kinds = {}  # one job for each set of keys
    for job in (job for phase in phases or jobs for job in jobs[phase]):
        kinds[tuple(sorted(override.split("=", 1)[0] for override in job))] = job
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in kinds.values():
            config.check(compose("config", overrides=list(job)))


def test_a_run_that_two_jobs_ask_for_is_made_once_and_names_of_phases_are_unique() -> None:
    names = [phase.name for study in STUDIES for phase in study.phases]
    assert len(names) == len(set(names))
    same = [("model=small", "lr_mult=2", "tags=[clippy]"), ("lr_mult=2.0", "model=small", "tags=[clippy_searched]")]
    assert unique([*same, ("model=large",)]) == [same[0], ("model=large",)]


def test_the_stream_holds_out_its_last_training_day_whatever_its_length() -> None:
    written = yaml.safe_load((ROOT / "conf" / "data" / "synthetic.yaml").read_text())["log"]
    rows, day = written["train_rows"], written["rows_per_day"]
    assert Setting(DATA["synthetic"]).validation == (f"data.log.train_rows={rows - day}",)
    longer = Setting(DATA["synthetic"], extra=("data.log.train_rows=900", "data.log.rows_per_day=100"))
    assert longer.validation == ("data.log.train_rows=800",)


def test_models_and_seeds_that_were_asked_for_replace_a_studys_own() -> None:
    setting = Setting(DATA["kuairand"], models=("large", "ple"), seeds=2)
    assert setting.models_of(("small", "large")) == ("large",)
    assert setting.seeds_or(10) == (0, 1)
    assert Setting(DATA["kuairand"]).seeds_or(10) == tuple(range(10))
    assert Setting(DATA["kuairand"], quick=True).models_of(("small", "large")) == ("small",)


def test_quick_asks_for_few_and_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(DATA["kuairand"], seeds=1, quick=True, extra=QUICK)
    jobs = {identity(job) for phase in all_jobs(setting, monkeypatch).values() for job in phase}
    assert len(jobs) < 250
    assert all(("train.max_steps", "60") in job for job in jobs)


def test_a_grid_is_every_combination_and_leaves_out_what_is_none() -> None:
    jobs = grid(("a=1",), {"x": (1, 0.001), "y": (None, "z")})
    assert jobs == [("a=1", "x=1"), ("a=1", "x=1", "y=z"), ("a=1", "x=0.001"), ("a=1", "x=0.001", "y=z")]


def test_table_3_takes_away_tasks_and_features_that_the_data_have() -> None:
    made = table3_rows(DATA["kuairand"])
    assert len(made) == 7
    two = made["two tasks fewer (is_comment, watch_time)"][1]
    assert two == "data.tasks=[is_click,long_view,is_like,is_follow,is_profile_enter]"


def test_a_mitigation_that_is_a_rate_replaces_the_rate() -> None:
    for job in mitigation_jobs(Setting(DATA["kuairand"])):
        assert sum(override.startswith("lr_mult=") for override in job) == 1
