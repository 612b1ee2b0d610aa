"""MLflow, by default in one SQLite file beside the runs, under the names of ``metrics.csv``."""

from __future__ import annotations

import logging
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.errors import UserError, install_hint
from ranker.training.tracker import Tracked, Tracker, flat_config, flat_result, keep_ids, known_ids

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
DEFAULT_URI = "sqlite:///mlflow.db"
FLUSH_SECONDS, BATCH = 5.0, 1000  # MLflow takes 1000 values in one call
KEPT_VALUES = 200_000  # while MLflow does not answer
LONGEST = 500  # characters of a parameter


class MlflowTracker(Logger, Tracker):
    """A Lightning logger for MLflow that writes in batches, and for runs that resume.

    Lightning's own makes a transaction of each row, and creates the database in every process of a distributed run.
    Values are written every few seconds and with each checkpoint. A resumed run goes on under its id, and a step of a
    metric that MLflow has is not written again.

    Args:
        run: the run.
        uri: where MLflow is: ``sqlite:///FILE``, or the address of a server.
        experiment: name of the experiment.
    """

    def __init__(self, run: Tracked, *, uri: str, experiment: str) -> None:
        super().__init__()
        self._run, self._experiment = run, experiment
        known = known_ids(run.folder.path)
        same_place = _absolute(uri) in (uri, known.get("mlflow_uri"))  # a relative one depends on the working folder
        self._uri = _absolute(uri) if same_place else str(known.get("mlflow_uri") or _absolute(uri))
        self._id: str | None = known.get("mlflow") if known.get("mlflow_uri") == self._uri else None
        self._client: Any = None
        self._values: list[Any] = []
        self._steps: dict[str, set[int]] = {}  # that MLflow has, by metric, of a resumed run
        self._flush_at = time.monotonic() + FLUSH_SECONDS

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._experiment

    @property
    def version(self) -> str | None:
        """The id of the run in MLflow; None before it began."""
        return self._id

    @property
    def experiment(self) -> Any:
        """MLflow's client; None before the run began, and in all processes but the first."""
        return self._client

    def begin(self, config: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
        """Creates the run, or goes on with it.

        Raises:
            UserError: MLflow cannot be reached, or does not have the run any more.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ModuleNotFoundError as error:
            raise UserError(f"logger=mlflow needs mlflow: {install_hint('mlflow')}") from error
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
        try:
            with _alone_at(self._uri), warnings.catch_warnings():  # of several jobs the first one makes the tables
                # MLflow 3 with SQLAlchemy 2.1: nothing that this project could mend.
                warnings.filterwarnings("ignore", message=".*noload.* loader strategy is deprecated")
                self._client = MlflowClient(self._uri)
                self._open()
        except MlflowException as error:
            hint = "; resume with logger=csv, or give it another logger.mlflow.tracking_uri" if self._id else ""
            raise UserError(f"MLflow at {self._uri}: {' '.join(str(error).split())[:300]}{hint}") from error
        keep_ids(self._run.folder.path, {"mlflow": self._id, "mlflow_uri": self._uri})
        self._write_params({**config, **made_with})

    def _open(self) -> None:
        if self._id is not None:
            self._client.get_run(self._id)  # raises if it is gone
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            place = None
            if self._uri.startswith(SQLITE):  # else files go below the working folder, whatever that is
                place = (Path(self._uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
            owner = self._client.create_experiment(self._experiment, artifact_location=place)
        else:
            owner = found.experiment_id
        tags = {"group": self._run.group, "optim": self._run.kind, "folder": str(self._run.folder.path)}
        tags |= {f"tag.{word}": "true" for word in self._run.tags}
        self._id = self._client.create_run(owner, run_name=self._run.name, tags=tags).info.run_id

    def _write_params(self, config: Mapping[str, Any]) -> None:
        """Writes the configuration. MLflow refuses another value of a parameter, so that becomes a tag."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._id).data.params
        flat = {name: str(value)[:LONGEST] for name, value in flat_config(config).items()}
        new = [Param(name, value) for name, value in flat.items() if name not in known]
        changed = [RunTag(f"resumed.{n}", value) for n, value in flat.items() if known.get(n, value) != value]
        for first in range(0, len(new), 100):  # MLflow takes 100 in one call
            self._client.log_batch(self._id, params=new[first : first + 100])
        self._client.log_batch(self._id, tags=changed[:100])

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: ``begin`` writes the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps the values of a step until the next batch is written."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), step or 0
        self._values += [Metric(name, float(x), now, step) for name, x in metrics.items() if not self._has(name, step)]
        if time.monotonic() > self._flush_at or len(self._values) >= BATCH:
            self.save()

    def _has(self, name: str, step: int) -> bool:
        if self._run.step is None:
            return False
        if name not in self._steps:
            self._steps[name] = {metric.step for metric in self._client.get_metric_history(self._id, name)}
        return step in self._steps[name]

    @rank_zero_only
    def save(self) -> None:
        """Writes what is held. Where MLflow does not answer, a line says so and the values wait for the next call."""
        if self._client is None:
            return
        self._flush_at = time.monotonic() + FLUSH_SECONDS
        try:
            while self._values:
                self._client.log_batch(self._id, metrics=self._values[:BATCH])
                del self._values[:BATCH]
        except Exception as error:  # of the database, of the network: training does not depend on it
            del self._values[:-KEPT_VALUES]
            log.warning(
                "MLflow at %s: %s; the values are kept for later", self._uri, " ".join(str(error).split())[:200]
            )

    def alert(self, title: str, text: str, *, serious: bool) -> None:
        """Writes the event as a tag of the run."""
        self._client.set_tag(self._id, f"event.{title}", text[:5000])

    def result(self, summary: Mapping[str, Any]) -> None:
        """Writes the result that is no curve as tags: status, reason, hash, commit, divergence."""
        self.save()
        metrics = summary.get("metrics", {})
        for name, value in flat_result(summary).items():
            if name not in metrics and value != "":
                self._client.set_tag(self._id, name, str(value)[:5000])

    def close(self, *, exit_code: int) -> None:
        """Ends the run in MLflow."""
        if self._client is None:
            return
        self.save()
        self._client.set_terminated(self._id, "FINISHED" if exit_code == 0 else "FAILED")


def _absolute(uri: str) -> str:
    """The address of a file of SQLite does not depend on the working folder of a later command."""
    if not uri.startswith(SQLITE) or uri.startswith(f"{SQLITE}/"):
        return uri
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"


def _alone_at(uri: str) -> AbstractContextManager[Any]:
    """A lock beside a file of SQLite. A server needs none."""
    if not uri.startswith(SQLITE):
        return nullcontext()
    path = Path(uri.removeprefix(SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=300)


def make(run: Tracked, *, tracking_uri: str | None = None, experiment: str = "evenkeel") -> MlflowTracker:
    """The tracker of a run; see ``ranker.training.trackers.mlflow``."""
    return MlflowTracker(
        run, uri=tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI, experiment=experiment
    )
