"""The trackers: ids that are kept, what is sent again, alerts, files, histograms; each tracker by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from omegaconf import OmegaConf

from ranker.errors import UserError
from ranker.runs.run_folder import RunFolder
from ranker.training import trackers
from ranker.training.histograms import Histograms, histogram_of
from ranker.training.tracker import Artifact, Histogram
from ranker.training.wandb_files import files_of
from ranker.training.wandb_tracker import WandbTracker, best_of
from tracked import mlflow_values, tensorboard_values, wandb_records, wandb_summary, wandb_values

CONFIG = OmegaConf.create({"seed": 0, "optim": {"name": "clippy", "lambda_rel": 0.5}})


def tracked_of(folder: Path, **options: Any) -> trackers.Tracked:
    return trackers.Tracked(RunFolder(folder), name="run", group="group", tags=["a tag"], kind="clippy", **options)


def logger_of(folder: Path, *, tracked: int | None = None, step: int | None = None, **options: Any) -> WandbTracker:
    made = trackers.weights_and_biases(tracked_of(folder, tracked=tracked, step=step), project="evenkeel", **options)
    assert isinstance(made, WandbTracker)
    return made


class FakeRun:
    """A run of a server that has some rows of it, as ``wandb.init`` gives it."""

    offline, id = False, "abc"

    def __init__(self, rows: int) -> None:
        self.step, self.rows, self.summary = rows, [], {}
        self.config = SimpleNamespace(update=lambda *_, **__: None)
        self.alerts: list[tuple[Any, ...]] = []

    def log(self, row: dict[str, Any], **_: Any) -> None:
        self.rows.append(row)

    def alert(self, *words: Any, **options: Any) -> None:
        self.alerts.append((*words, options["level"]))

    def define_metric(self, *_: Any, **__: Any) -> None:
        """What a real one is asked to do is in test_the_best_and_the_last_value."""


def test_a_resumed_run_has_the_id_of_its_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = logger_of(tmp_path)
    assert logger_of(tmp_path).version != first.version, "nothing is written before the run starts"
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(0))
    monkeypatch.setattr(FakeRun, "id", first.version)

    trackers.write_config([first], CONFIG)

    assert logger_of(tmp_path).version == first.version
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert logger_of(tmp_path).version == first.version
    assert logger_of(tmp_path / "other").version == "fromagent"


def test_a_resumed_run_has_the_rows_after_its_checkpoint_dropped_where_that_is_asked_for(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"seed": 0})
    with trackers.finishing([first := logger_of(tmp_path)]):
        trackers.write_config([first], cfg)
        for step in range(1, 6):
            first.log_metrics({"loss": 1.0 / step}, step=step)
        at_the_checkpoint = trackers.position([first])
        first.log_metrics({"loss": 9.0}, step=6)
    assert at_the_checkpoint == 5

    with trackers.finishing([resumed := logger_of(tmp_path, tracked=at_the_checkpoint, rewind=True)]):
        trackers.write_config([resumed], cfg)
        settings = resumed.experiment.settings
        moment = settings.resume_from
        assert (moment.run, moment.metric, moment.value, settings.resume) == (first.version, "_step", 4, None)
        assert resumed.version == first.version

    for options in ({"tracked": 5}, {"tracked": None, "rewind": True}, {"tracked": 0, "rewind": True}):
        assert "resume_from" not in logger_of(tmp_path, **options)._wandb_init


def test_a_server_that_cannot_rewind_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("cannot rewind a run that is not in a terminal state")

    monkeypatch.setattr(wandb, "init", refuse)
    cfg = OmegaConf.create({"seed": 0})
    with pytest.raises(UserError, match=r"not in a terminal state\); resume with logger.wandb.rewind=false"):
        trackers.write_config([logger_of(tmp_path, tracked=5, rewind=True)], cfg)
    with pytest.raises(wandb.Error, match="terminal"):
        trackers.write_config([logger_of(tmp_path, tracked=5)], cfg)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("val/click/auc", "max"),
        ("progressive/watch_time/rmse", "min"),
        ("val/click/ndcg_10.user", "max"),
        ("val/click/calibration", None),
        ("train/click/auc", None),
        ("test/click/auc", None),
        ("lr", None),
    ],
)
def test_evaluations_have_a_best_value_in_their_direction(name: str, best: str | None) -> None:
    assert best_of(name) == best


def test_the_best_and_the_last_value_an_alert_and_histograms_are_in_the_run(tmp_path: Path) -> None:
    made_with = {"commit": "abc", "config_hash": "1234"}
    with trackers.finishing([logger := logger_of(tmp_path)]):
        trackers.write_config([logger], CONFIG, made_with)
        for step, auc in enumerate((0.6, 0.8, 0.7), start=1):
            logger.log_metrics({"val/click/auc": auc, "val/click/logloss": auc, "train/loss": 1.0}, step=step)
        trackers.alert([logger], "full divergence at step 3", "the loss rose", serious=True)
        trackers.histograms([logger], {"histograms/weights/w.x": Histogram([1, 3], [0.0, 0.5, 1.0])}, 3)
        trackers.write_summary([logger], {"status": "diverged", "metrics": {"test/click/auc": 0.5}})

    shown = wandb_summary(tmp_path)
    assert shown["val/click/auc"] == {"max": 0.8, "last": 0.7}
    assert shown["val/click/logloss"] == {"min": 0.6, "last": 0.7}
    assert (shown["status"], shown["test/click/auc"]) == ("diverged", 0.5)
    (found,) = wandb_records(tmp_path)
    by_kind = {kind: [r for r in found if r.WhichOneof("record_type") == kind] for kind in ("run", "alert", "metric")}
    run = by_kind["run"][0].run
    assert (run.run_group, run.job_type, list(run.tags)) == ("group", "clippy", ["a tag"])
    config = {u.key or ".".join(u.nested_key): u.value_json for r in found for u in r.config.update}
    assert json.loads(config["commit"]) == "abc"
    assert json.loads(config["optim"])["lambda_rel"] == 0.5
    assert [(r.alert.title, r.alert.level) for r in by_kind["alert"]] == [("full divergence at step 3", "ERROR")]
    axis = [r.metric for r in by_kind["metric"] if r.metric.glob_name == "*" or r.metric.name == "val/click/auc"]
    assert {metric.step_metric for metric in axis} == {"trainer/global_step"}
    assert any("histograms/weights/w.x" in str(r.history) and "[0,0.5,1]" in str(r.history) for r in found)


def test_what_a_server_has_is_not_sent_again_and_what_got_lost_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with trackers.finishing([first := logger_of(tmp_path)]):
        trackers.write_config([first], CONFIG)
        for step in range(1, 7):
            first.log_metrics({"loss": 1.0}, step=step)
        trackers.alert([first], "rollback at step 6", "from step 6 to 3", serious=False)
    assert len(wandb_records(tmp_path)) == 1  # it is written
    run = FakeRun(5)  # the sixth row did not reach it before the machine went down
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    resumed = logger_of(tmp_path, step=3)
    monkeypatch.setattr(FakeRun, "id", resumed.version)

    trackers.write_config([resumed], CONFIG)
    for step in range(4, 8):
        resumed.log_metrics({"loss": 1.0} | ({"late": 2.0} if step == 5 else {}), step=step)
    trackers.alert([resumed], "rollback at step 6", "from step 6 to 3", serious=False)
    trackers.alert([resumed], "rollback at step 7", "from step 7 to 3", serious=False)

    assert [(row["trainer/global_step"], *sorted(row)[:1]) for row in run.rows] == [
        (5, "late"),
        (6, "loss"),
        (7, "loss"),
    ]
    assert run.alerts == [("rollback at step 7", "from step 7 to 3", "WARN")]
    assert "W&B has steps 4 to 5 of an earlier attempt and keeps them" in capsys.readouterr().out


def test_attempts_of_one_second_are_found_in_their_order(tmp_path: Path) -> None:
    names = ("run-20260101_120000-abc", "offline-run-20260101_120000-abc-1", "offline-run-20260101_120001-abc")
    for name in (*names, "offline-run-20260101_120000-xyz"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / f"run-{name.split('-')[-1] if 'xyz' in name else 'abc'}.wandb").touch()

    assert [path.parent.name for path in files_of(tmp_path, "abc")] == list(names)


def test_what_wandb_lost_of_a_killed_run_is_sent_from_metrics_csv(tmp_path: Path) -> None:
    csv = trackers.metrics_csv(tracked_of(tmp_path))
    with trackers.finishing([first := logger_of(tmp_path)]):
        trackers.write_config([first], CONFIG)
        for step in range(1, 31):
            for logger in (first, csv):
                logger.log_metrics({"loss": 1.0 / step} | ({"val/click/auc": 0.5} if step % 8 == 0 else {}), step=step)
        csv.save()
    assert len(wandb_records(tmp_path)) == 1  # it is written
    (path,) = files_of(tmp_path, str(first.version))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    kept = max(step for step, _ in wandb_values(tmp_path, ended=False)[0])
    assert kept < 24

    with trackers.finishing([resumed := logger_of(tmp_path, step=24)]):
        trackers.write_config([resumed], CONFIG)
        resumed.log_metrics({"loss": 1.0 / 24, "late": 1.0}, step=24)
        for step in range(25, 33):
            resumed.log_metrics({"loss": 1.0 / step}, step=step)

    values, count = wandb_values(tmp_path)
    assert {step: values[step, "loss"] for step in range(1, 33)} == {n: pytest.approx(1.0 / n) for n in range(1, 33)}
    assert [step for step, name in sorted(values) if name == "val/click/auc"] == [8, 16, 24]
    assert values[24, "late"] == 1.0
    assert set(count.values()) == {1}


def test_alerts_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(0)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    for alerts in (False, True):
        logger = logger_of(tmp_path, alerts=alerts)
        trackers.write_config([logger], CONFIG)
        trackers.alert([logger], "lost", "the loss rose", serious=True)
    assert run.alerts == [("lost", "the loss rose", "ERROR")]


def test_files_that_are_asked_for_become_artifacts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    best = tmp_path / "checkpoints" / "best"
    best.mkdir(parents=True)
    for path in (tmp_path / "checkpoints" / "step=8.ckpt", best / "step=4.ckpt", tmp_path / "report.html"):
        path.write_text(str(path))
    (best / "best.json").write_text(json.dumps({"metric": "val/click/auc", "step": 4, "value": 0.7}))
    (tmp_path / "capsules" / "step=3").mkdir(parents=True)
    (tmp_path / "capsules" / "step=3" / "batch").write_text("rows")

    with trackers.finishing([logger := logger_of(tmp_path, artifacts=["checkpoint", "capsule"])]):
        trackers.write_config([logger], CONFIG)
        trackers.write_summary([logger], {"status": "failed", "metrics": {}}, folder)
        trackers.write_summary([logger], {"status": "completed", "metrics": {}}, folder)

    kept = [
        (record.artifact.type, record.artifact.name.split("-")[0], sorted(record.artifact.aliases))
        for record in wandb_records(tmp_path)[0]
        if record.WhichOneof("record_type") == "artifact"
    ]
    assert kept == [
        ("model", "checkpoint", ["latest", "step-8"]),
        ("model", "checkpoint", ["best", "latest"]),
        ("capsule", "capsule", ["latest", "step-3"]),
    ], "of the run that ended, without the page that nobody asked for"
    assert not trackers.wants([logger], "report")
    with pytest.raises(UserError, match=r"logger.wandb.artifacts 'capsules' is unknown; did you mean 'capsule'"):
        logger_of(tmp_path, artifacts=["capsules"])


def test_an_export_is_added_to_the_run_that_it_came_from(tmp_path: Path) -> None:
    RunFolder(tmp_path).save_config(
        OmegaConf.create({"logger": {"wandb": {"project": "evenkeel", "entity": None}, "csv": {}}})
    )
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.pt2").write_text("weights")
    artifact = Artifact("export", tmp_path / "export")
    with pytest.raises(UserError, match="was not tracked in W&B"):
        trackers.keep_later(tmp_path, artifact)
    (tmp_path / "tracker.json").write_text(json.dumps({"wandb": "abc"}))

    trackers.keep_later(tmp_path, artifact)

    (found,) = wandb_records(tmp_path)
    assert [r.artifact.name for r in found if r.WhichOneof("record_type") == "artifact"] == ["export-abc"]


def test_tensorboard_shows_each_step_once_and_histograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(logger: trackers.Logger, numbers: range) -> None:
        for step in numbers:
            logger.log_metrics({"train/loss": 1.0 * step}, step=step)

    with trackers.finishing([first := trackers.tensorboard(tracked_of(tmp_path))]):
        trackers.write_config([first], CONFIG)
        steps(first, range(1, 7))
        trackers.histograms([first], {"w": Histogram([1, 3], [0.0, 0.5, 1.0])}, 2)
    with trackers.finishing([resumed := trackers.tensorboard(tracked_of(tmp_path, step=3))]):
        trackers.write_config([resumed], CONFIG)
        steps(resumed, range(3, 8))
        trackers.alert([resumed], "lost", "the loss rose", serious=True)
        trackers.write_summary([resumed], {"status": "completed", "metrics": {"test/click/auc": 0.7}})

    values, count = tensorboard_values(tmp_path)
    assert {step: values[step, "train/loss"] for step in range(1, 8)} == {step: 1.0 * step for step in range(1, 8)}
    assert set(count.values()) == {1}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (histogram,) = events.Histograms("w")
    assert (histogram.step, list(histogram.histogram_value.bucket)) == (2, [1, 3])
    assert "events/text_summary" in events.Tags()["tensors"]


def test_histograms_count_the_finite_values_of_a_tensor() -> None:
    found = histogram_of(torch.tensor([0.0, 1.0, 1.0, math.nan, math.inf]), bins=2)
    assert found == Histogram([1.0, 2.0], [0.0, 0.5, 1.0])
    assert sum(histogram_of(torch.full((7,), 3.0), bins=4).counts) == 7, "all values are equal"  # type: ignore[union-attr]
    assert histogram_of(torch.tensor([math.nan]), bins=2) is None
    rows = torch.sparse_coo_tensor([[1, 1], [0, 1]], [1.0, 3.0], (4, 2), check_invariants=True)
    assert histogram_of(rows, bins=2) == Histogram([1.0, 1.0], [1.0, 2.0, 3.0]), "of a sparse gradient what it stores"


def test_histograms_are_measured_when_they_are_due(fit: Any, tmp_path: Path) -> None:
    class Keeps(WandbTracker):
        def __init__(self) -> None:
            self.found: list[tuple[int, set[str]]] = []

        def histograms(self, found: Any, step: int) -> None:
            self.found.append((step, set(found)))

    kept = Keeps()
    callback = Histograms(every=20, parameters=["bottom.layers.0"])
    trainer = fit([callback], max_steps=2)
    trainer.loggers = [kept]
    for step in (19, 20, 39):
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.ready = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(trainer), "global_step", property(lambda _, step=step: step))
            callback.on_before_optimizer_step(trainer, trainer.lightning_module, trainer.optimizers[0])

    names = {
        f"histograms/{kind}/bottom.layers.0.{part}" for kind in ("weights", "log10_G") for part in ("weight", "bias")
    }
    assert [step for step, _ in kept.found] == [20, 40]
    assert all(names <= found for _, found in kept.found)
    with pytest.raises(UserError, match="no parameter begins with 'top'"):
        Histograms(every=1, parameters=["top"]).on_fit_start(trainer, trainer.lightning_module)
    with pytest.raises(UserError, match="bins 1 to 512"):
        Histograms(bins=0)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.mark.slow  # MLflow makes its tables for five seconds
def test_mlflow_has_each_step_once_and_the_configuration(tmp_path: Path, database: str) -> None:
    from mlflow import MlflowClient

    with trackers.finishing([first := trackers.mlflow(tracked_of(tmp_path), tracking_uri=database)]):
        trackers.write_config([first], CONFIG, {"commit": "abc"})
        for step in range(1, 7):
            first.log_metrics({"val/click/auc": 0.1 * step, "sigma/w.x": math.nan}, step=step)
    changed = OmegaConf.merge(CONFIG, {"optim": {"lambda_rel": 0.25}})
    resumed = trackers.mlflow(tracked_of(tmp_path, step=3), tracking_uri=database)
    trackers.write_config([resumed], changed)
    for step in range(4, 8):
        resumed.log_metrics({"val/click/auc": 0.1 * step}, step=step)
    trackers.alert([resumed], "lost", "the loss rose", serious=True)
    trackers.write_summary([resumed], {"status": "diverged", "metrics": {"test/click/auc": 0.5}})
    with pytest.raises(KeyError, match="a crash"), trackers.finishing([resumed]):
        raise KeyError("a crash")

    values, count = mlflow_values(tmp_path)
    assert {step: values[step, "val/click/auc"] for step in range(1, 8)} == {n: 0.1 * n for n in range(1, 8)}
    assert math.isnan(values[1, "sigma/w.x"])
    assert set(count.values()) == {1}
    run = MlflowClient(database).get_run(resumed.version)
    assert run.data.params["optim.lambda_rel"] == "0.5"
    assert run.data.tags["resumed.optim.lambda_rel"] == "0.25"
    assert (run.data.params["commit"], run.data.tags["group"], run.data.tags["status"]) == ("abc", "group", "diverged")
    assert run.data.tags["event.lost"] == "the loss rose"
    assert run.info.status == "FAILED"


@pytest.mark.slow  # MLflow makes its tables for five seconds
def test_mlflow_that_does_not_answer_stops_no_training(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = trackers.mlflow(tracked_of(tmp_path), tracking_uri=database)
    trackers.write_config([logger], CONFIG)
    client, down = logger.experiment, SimpleNamespace()
    down.log_batch = lambda *_, **__: (_ for _ in ()).throw(OSError("database is locked"))

    logger._client = down  # type: ignore[attr-defined]
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    assert "database is locked; the values are kept for later" in caplog.text
    logger._client = client  # type: ignore[attr-defined]
    with trackers.finishing([logger]):
        logger.log_metrics({"loss": 2.0}, step=2)

    assert mlflow_values(tmp_path)[0] == {(1, "loss"): 1.0, (2, "loss"): 2.0}


@pytest.mark.slow  # MLflow makes its tables for five seconds
def test_a_run_that_mlflow_has_lost_is_said_in_one_line(tmp_path: Path, database: str) -> None:
    known = {"mlflow": "gone", "mlflow_uri": database}
    (tmp_path / "tracker.json").write_text(json.dumps(known))
    logger = trackers.mlflow(tracked_of(tmp_path, step=3), tracking_uri=database)
    with pytest.raises(UserError, match=r"gone.* not found; resume with logger=csv"):
        trackers.write_config([logger], CONFIG)


def test_an_option_that_a_logger_does_not_have_is_said_in_one_line(tmp_path: Path) -> None:
    node = {"_target_": "ranker.training.trackers.metrics_csv", "_partial_": True, "colour": "blue"}
    with pytest.raises(UserError, match=r"logger.csv: .*unexpected keyword argument 'colour'"):
        trackers.build(OmegaConf.create({"csv": node}), tracked_of(tmp_path))
