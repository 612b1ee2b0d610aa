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
        self._columns: list[str] = ["step"]
        self._rows: dict[int, dict[str, Any]] = {}
        self._flushed = time.monotonic()

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
        self._columns += [name for name in metrics if name not in self._columns]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters stand in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Writes the file whole and puts it in place at once."""
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows[step] for step in sorted(self._rows))
        temporary.replace(self.path)
        self._flushed = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()
