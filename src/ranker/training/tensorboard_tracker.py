"""TensorBoard files in the run folder, under the names of ``metrics.csv``; one curve over all attempts at a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ranker.errors import UserError, install_hint
from ranker.training.tracker import Histogram, Tracked, Tracker, flat_result

FOLDER = "tensorboard"  # in the run folder


class TensorboardTracker(TensorBoardLogger, Tracker):
    """Lightning's logger for TensorBoard, for runs that resume.

    Each attempt writes a file of its own. That of a resumed run begins with the step after its checkpoint, from which
    on TensorBoard leaves out what earlier files hold.

    Args:
        run: the run.
    """

    def __init__(self, run: Tracked) -> None:
        again: dict[str, Any] = {} if run.step is None else {"purge_step": run.step + 1}
        super().__init__(save_dir=str(run.folder.path), name="", version=FOLDER, default_hp_metric=False, **again)
        self._run, self._config, self._step = run, dict[str, Any](), 0
        self._known: set[str] = set()  # names that earlier files have at the checkpoint's step

    def begin(self, config: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
        """Keeps the configuration until the result is known: TensorBoard shows both in one row."""
        self._config = {**config, **made_with}
        if self._run.step is not None:
            self._known = _names_at(self._run.step, self._run.folder.path / FOLDER)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the values of a step."""
        self._step = max(self._step, step or 0)
        if self._known and step == self._run.step:
            metrics = {name: value for name, value in metrics.items() if name not in self._known}
        super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def save(self) -> None:
        """Has the file on the disk: called with each checkpoint."""
        super().save()
        self.experiment.flush()

    def alert(self, title: str, text: str, *, serious: bool) -> None:
        """Writes the event as a text, at the last step that has values."""
        self.experiment.add_text("events", f"**{title}**: {text}", self._step)

    def histograms(self, found: Mapping[str, Histogram], step: int) -> None:
        """Writes histograms of a step."""
        for name, x in found.items():
            middles = [(low + high) / 2 for low, high in zip(x.edges, x.edges[1:], strict=False)]
            sums = [sum(n * m**power for n, m in zip(x.counts, middles, strict=True)) for power in (1, 2)]
            self.experiment.add_histogram_raw(
                name,
                min=x.edges[0],
                max=x.edges[-1],
                num=sum(x.counts),
                sum=sums[0],
                sum_squares=sums[1],
                bucket_limits=list(x.edges[1:]),
                bucket_counts=list(x.counts),
                global_step=step,
            )

    def result(self, summary: Mapping[str, Any]) -> None:
        """Writes configuration and result as a row of the tab HPARAMS."""
        numbers = {
            name: float(value)
            for name, value in flat_result(summary).items()
            if name in summary.get("metrics", {}) and isinstance(value, (int, float))
        }
        self.log_hyperparams({**self._config, "status": summary.get("status", "")}, numbers)

    def close(self, *, exit_code: int) -> None:
        """Writes what is left."""
        self.finalize("success" if exit_code == 0 else "failed")


def _names_at(step: int, folder: Path) -> set[str]:
    """Names of the values that the files in a folder have at a step."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: set[str] = set()
    for path in sorted(folder.glob("events.out.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.step == step and event.HasField("summary"):
                found |= {value.tag for value in event.summary.value}
    return found


def make(run: Tracked) -> TensorboardTracker:
    """The tracker of a run.

    Raises:
        UserError: the package tensorboard is not installed.
    """
    try:
        return TensorboardTracker(run)
    except ModuleNotFoundError as error:
        raise UserError(f"logger=tensorboard needs tensorboard: {install_hint('report')}") from error
