"""metrics.csv: one row a step that logged something, written whole at every flush and continued on resume."""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

FLUSH_SECONDS = 5.0
FLUSH_SHARE = 0.01  # of the time may go into writing: a long run's file takes seconds


class MetricsCsv(Logger):
    """Lightning logger that keeps one row a step and one column a metric.

    Lightning's CSVLogger starts its file anew when a run goes on; this one keeps what was written up to the step
    that is resumed and drops what came after it, so that no step stands twice.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: dict[str, None] = {"step": None}  # in order; a list would be searched for every number
        self._rows: dict[int, dict[str, Any]] = {}
        self._flush_at = time.monotonic() + FLUSH_SECONDS

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file a run, so one version."""
        return ""

    def resume(self, step: int) -> None:
        """Reads back the rows up to a step."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) <= step:
                    self.log_metrics({k: v for k, v in row.items() if k != "step" and v != ""}, int(row["step"]))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds to the row of a step."""
        row = self._rows.setdefault(step or 0, {"step": step or 0})
        row.update(metrics)
        self._columns.update(dict.fromkeys(metrics))
        if time.monotonic() > self._flush_at:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters stand in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Writes the file whole and puts it in place at once."""
        start = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            writer.writerows(map(self._rows[step].get, self._columns) for step in sorted(self._rows))
        temporary.replace(self.path)
        end = time.monotonic()
        self._flush_at = end + max(FLUSH_SECONDS, (end - start) / FLUSH_SHARE)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()
