"""Weights & Biases: one run there per run folder, whatever the number of attempts, with its best and last values."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker import deferred
from ranker.errors import UserError, one_of
from ranker.runs.metric_names import PROGRESSIVE, VAL
from ranker.runs.objective import DIRECTIONS, kind_of
from ranker.runs.run_folder import METRICS
from ranker.training.lightning_private import rewinds, without_anonymous
from ranker.training.metrics_csv import rows_until
from ranker.training.tracker import Artifact, Histogram, Tracked, Tracker, flat_result, keep_ids, known_ids
from ranker.training.wandb_files import GLOBAL_STEP, Sent, sent_before

log = logging.getLogger(__name__)

ARTIFACTS = ("checkpoint", "capsule", "report")  # of a run that ended; an export comes later, with export --wandb
# How the page of an artifact is sorted: W&B lists artifacts by type.
TYPES = {"checkpoint": "model", "export": "model", "capsule": "capsule", "report": "report"}


def wandb_mode() -> str:
    """``WANDB_MODE`` where set, else online for a user who is logged in and offline for everybody else."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb  # imported late: it costs a second, and most commands never track

    try:
        logged_in = bool(wandb.api.api_key)
    except Exception:  # no netrc, an unreadable one, a malformed key: whatever it is, nobody is logged in
        logged_in = False
    return "online" if logged_in else "offline"


def best_of(name: str) -> str | None:
    """``max`` or ``min``: which value of a metric is the best. None for a metric that is not compared so.

    Args:
        name: such as ``val/click/auc``. Those of training batches are too noisy to have a best one, and those of the
            test are one value.
    """
    phase, _, metric = name.partition("/")
    if phase not in (VAL, PROGRESSIVE):
        return None
    return {"maximize": "max", "minimize": "min"}.get(DIRECTIONS.get(kind_of(metric), ""))


class WandbTracker(WandbLogger, Tracker):
    """Lightning's logger for W&B, for runs that resume.

    The x axis of every chart is ``trainer/global_step``. Metrics of evaluations have their best and their last value in
    the summary. What an earlier attempt sent after the checkpoint from which the run resumes is not sent again: these
    steps give the same values. It is read from W&B's own files in the run folder.

    Args:
        run: the run.
        alerts: send an alert when the model is lost, and at a rollback.
        artifacts: kinds of files that W&B keeps.
        options: arguments of Lightning's logger and of ``wandb.init``.

    Raises:
        UserError: there is no such kind of artifact.
    """

    def __init__(self, run: Tracked, *, alerts: bool, artifacts: Sequence[str], **options: Any) -> None:
        for kind in artifacts:
            one_of(kind, ARTIFACTS, "logger.wandb.artifacts")
        super().__init__(**options)
        self._run, self._alerts, self.artifacts = run, alerts, tuple(artifacts)
        self._defined: set[str] = set()
        self._sent = Sent()
        self._first_row: int | None = None  # number of the next row, where wandb does not know it
        self._extremes: dict[str, tuple[float, float]] = {}
        self._last: dict[str, float] = {}

    def begin(self, config: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
        """Opens the run, and reads what earlier attempts have sent.

        Raises:
            UserError: W&B does not rewind the run.
        """
        keep_ids(self._run.folder.path, {"wandb": self.version})
        self._open()
        self.log_hyperparams({**config, **made_with})
        if self._run.step is None:
            return
        offline = bool(self.experiment.offline)
        try:
            self._sent = sent_before(
                self._run.folder.path,
                str(self.version),
                step=self._run.step,
                known_rows=None if offline else int(self.experiment.step),
                wanted=lambda name: best_of(name) is not None,
            )
        except (OSError, ValueError) as error:  # another format: the run must go on all the same
            log.warning("W&B may show steps after %d twice: %s", self._run.step, error)
            return
        self._extremes = dict(self._sent.extremes)
        if rewinds(self):
            self._sent.values.clear()
            self._sent.alerts.clear()
        elif offline:
            self._first_row = self._sent.rows  # the files of all attempts become one run when they are uploaded
        if self._sent.last_step > self._run.step:
            print(
                f"W&B has steps {self._run.step + 1} to {self._sent.last_step} of an earlier attempt and keeps them; "
                "logger.wandb.rewind=true replaces them",
                flush=True,
            )
        self._fill_up(self._run.step)

    def _fill_up(self, step: int) -> None:
        """Sends what metrics.csv has up to the checkpoint and W&B has not.

        W&B's own process keeps rows for a while before it writes them, and loses them if the machine goes down, or if
        it ends with the run that was killed. metrics.csv is on the disk whenever a checkpoint is.
        """
        for at, row in rows_until(self._run.folder.path / METRICS, step):
            lost = {name: x for name, x in row.items() if at > self._sent.newest.get(name, -1)}
            self._log({name: x for name, x in lost.items() if (at, name) not in self._sent.values}, at)
            self._sent.values |= {(at, name): 0 for name in lost if at == step}  # some of this step come again

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends the values of a step that W&B does not have."""
        self._log({name: x for name, x in metrics.items() if (step, name) not in self._sent.values}, step)

    def _log(self, values: Mapping[str, Any], step: int | None) -> None:
        if not values:
            return
        for name, value in values.items():
            self._define(name)
            if best_of(name) and isinstance(value, float) and math.isfinite(value):
                low, high = self._extremes.get(name, (math.inf, -math.inf))
                self._extremes[name] = min(low, value), max(high, value)
                self._last[name] = value
        row = dict(values) if step is None else {**values, GLOBAL_STEP: step}
        number, self._first_row = self._first_row, None
        self.experiment.log(row, step=number, commit=True)

    def _define(self, name: str) -> None:
        if name in self._defined:
            return
        self._defined.add(name)
        if best := best_of(name):
            self.experiment.define_metric(name, step_metric=GLOBAL_STEP, step_sync=True, summary=f"{best},last")

    def alert(self, title: str, text: str, *, serious: bool) -> None:
        """Sends an alert to where the user has W&B send them, e-mail or Slack."""
        if self._alerts and (title, text) not in self._sent.alerts:
            self.experiment.alert(title, text, level="ERROR" if serious else "WARN")

    def histograms(self, found: Mapping[str, Histogram], step: int) -> None:
        """Sends histograms of a step that W&B does not have."""
        import wandb

        new = {name: x for name, x in found.items() if (step, name) not in self._sent.values}
        arrays = {name: (np.asarray(x.counts), np.asarray(x.edges)) for name, x in new.items()}
        self._log({name: wandb.Histogram(np_histogram=x) for name, x in arrays.items()}, step)

    def keep(self, artifact: Artifact) -> None:
        """Sends files as an artifact, whose versions are those of this run."""
        if artifact.kind in self.artifacts:
            log_artifact(self.experiment, artifact)

    def result(self, summary: Mapping[str, Any]) -> None:
        """Writes the result of the run to its summary, and the best values over all attempts."""
        best = {
            name: {best_of(name): high if best_of(name) == "max" else low, "last": self._last[name]}
            for name, (low, high) in self._extremes.items()
            if name in self._last
        }
        self.experiment.summary.update({**flat_result(summary), **best})

    def close(self, *, exit_code: int) -> None:
        """Ends the run; says how to upload one that is only on this machine."""
        import wandb

        if wandb.run is None:
            return
        offline = wandb.run.offline
        wandb.finish(exit_code=exit_code)
        if offline:
            folder = self._run.folder.path / "wandb"
            print(f"tracked offline; upload with: wandb sync {folder}/offline-run-*", flush=True)

    def _open(self) -> None:
        import wandb

        try:
            _ = self.experiment
        except wandb.Error as error:
            if not rewinds(self):
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"W&B does not rewind the run ({reason}); resume with logger.wandb.rewind=false") from error


def make(
    run: Tracked,
    *,
    project: str,
    entity: str | None = None,
    group: str | None = None,
    rewind: bool = False,
    alerts: bool = True,
    artifacts: Sequence[str] = (),
) -> WandbTracker:
    """The tracker of a run; see ``ranker.training.trackers.weights_and_biases``."""
    import wandb

    deferred.defer()  # now that wandb is there: starting a run would import all of W&B Launch
    name = run_id(run.folder.path)
    back: dict[str, Any] = {}
    if rewind and run.tracked:
        # Rows count from 0, and the one that is named is kept.
        back = {"resume": None, "resume_from": f"{name}?_step={run.tracked - 1}"}
    tracker = WandbTracker(
        run,
        alerts=alerts,
        artifacts=artifacts,
        name=run.name,
        id=name,
        project=project,
        entity=entity,
        group=group or run.group,
        job_type=run.kind or None,
        tags=run.tags,
        save_dir=str(run.folder.path),
        mode=wandb_mode(),
        settings=wandb.Settings(quiet=True),  # the run prints its own summary
        **back,
    )
    without_anonymous(tracker)
    return tracker


def run_id(folder: Path) -> str:
    """The id of the run in W&B: that of its earlier attempt, or of the agent that started it, or a new one."""
    return str(known_ids(folder).get("wandb") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))


def log_artifact(run: Any, artifact: Artifact) -> None:
    """Sends files to an open run of W&B."""
    import wandb

    made = wandb.Artifact(f"{artifact.kind}-{run.id}", type=TYPES[artifact.kind])
    if artifact.path.is_dir():
        made.add_dir(str(artifact.path))
    else:
        made.add_file(str(artifact.path))
    run.log_artifact(made, aliases=["latest", *artifact.aliases])


@contextmanager
def opened_again(folder: Path, *, project: str, entity: str | None) -> Iterator[Any]:
    """Opens the run of a folder after its end, to add something to it.

    Args:
        folder: the run folder, with the id of the run in ``tracker.json``.
        project: the project's name.
        entity: user or team; None for the user's default.
    """
    import wandb

    run = wandb.init(
        id=run_id(folder),
        project=project,
        entity=entity,
        resume="allow",
        dir=str(folder),
        settings=wandb.Settings(quiet=True, mode=wandb_mode()),  # type: ignore[arg-type]  # any that WANDB_MODE says
    )
    try:
        yield run
    finally:
        run.finish()
