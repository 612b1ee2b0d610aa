"""A log with fewer tasks or features than its source offers."""

from __future__ import annotations

from ranker.data.batch import Batch
from ranker.data.log import Log
from ranker.data.schema import Schema


class Selected:
    """Shows part of another log's columns; rows and their order stay the same.

    Args:
        log: the source.
        schema: its schema after ``Schema.select``.
    """

    def __init__(self, log: Log, schema: Schema) -> None:
        self.schema = schema
        self._log = log
        names = set(schema.feature_names)
        self._dense = [i for i, f in enumerate(log.schema.dense) if f.name in names]
        self._one_hot = [i for i, f in enumerate(log.schema.one_hot) if f.name in names]
        self._ragged = [f.name for f in schema.ragged]
        self._tasks = [log.schema.task_names.index(name) for name in schema.task_names]

    @property
    def train_rows(self) -> int:
        """Rows to train on."""
        return self._log.train_rows

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self._log.num_rows

    @property
    def bad_rows(self) -> dict[tuple[str, int], int]:
        """Rows the source left out because they could not be used, by file and row group; only files can hold such."""
        return getattr(self._log, "bad_rows", {})

    @property
    def num_bad_rows(self) -> int:
        """How many rows that is in all."""
        return sum(self.bad_rows.values())

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1, in the chosen columns."""
        rows = self._log.read(start, stop)
        return Batch(
            dense_BF=rows.dense_BF[:, self._dense],
            onehot_BC=rows.onehot_BC[:, self._one_hot],
            ragged={name: rows.ragged[name] for name in self._ragged},
            labels_BT=rows.labels_BT[:, self._tasks],
            mask_BT=rows.mask_BT[:, self._tasks],
            time_ms_B=rows.time_ms_B,
            row_B=rows.row_B,
            window=rows.window,
        )

    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time."""
        return self._log.row_at_time(time_ms)

    def time_at_row(self, row: int) -> int:
        """Time of a row."""
        return self._log.time_at_row(row)
