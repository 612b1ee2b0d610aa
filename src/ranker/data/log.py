"""The interface of every log (rows in time order, read by position), and a view of one with fewer columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from ranker.data.batch import Batch
from ranker.data.schema import Schema


class Log(ABC):
    """A time-ordered log. A log of your own is a subclass.

    Reading is deterministic, and any position is found without reading the rows before it. Several threads may read
    at the same time.

    Attributes:
        schema: features and tasks of the rows.
        train_rows: number of training rows, positions 0 .. train_rows - 1.
        num_rows: number of all rows. The hold-out, used for evaluation only, is train_rows .. num_rows - 1.
    """

    schema: Schema

    @property
    @abstractmethod
    def train_rows(self) -> int: ...  # noqa: D102

    @property
    @abstractmethod
    def num_rows(self) -> int: ...  # noqa: D102

    @property
    def id_types(self) -> dict[str, str]:
        """By column of a categorical feature, what its ids are: ``string`` or ``integer``. Empty if unknown."""
        return {}

    @property
    def bad_rows(self) -> dict[tuple[str, int], int]:
        """By file and row group, the number of rows dropped so far because they cannot be used."""
        return {}

    @property
    def num_bad_rows(self) -> int:
        """Number of rows dropped so far because they cannot be used."""
        return sum(self.bad_rows.values())

    @abstractmethod
    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1 in time order, on the CPU, with ``row_B`` and ``time_ms_B`` set."""

    @abstractmethod
    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time (Unix milliseconds). num_rows if there is none."""

    @abstractmethod
    def time_at_row(self, row: int) -> int:
        """Time of the row at a position (Unix milliseconds)."""


class Selected(Log):
    """A log with fewer tasks or features than its source. Rows and their order are the same.

    Args:
        log: the source.
        schema: the source's schema after ``Schema.select``.
    """

    def __init__(self, log: Log, schema: Schema) -> None:
        self.schema = schema
        self._log = log
        names = set(schema.feature_names)
        self._dense = [i for i, f in enumerate(log.schema.dense) if f.name in names]
        self._one_hot = [i for i, f in enumerate(log.schema.one_hot) if f.name in names]
        self._tasks = [log.schema.task_names.index(name) for name in schema.task_names]

    @property
    def source(self) -> Log:
        """The log with all its columns."""
        return self._log

    @property
    def train_rows(self) -> int:
        """Number of training rows."""
        return self._log.train_rows

    @property
    def num_rows(self) -> int:
        """Number of all rows."""
        return self._log.num_rows

    @property
    def id_types(self) -> dict[str, str]:
        """As in the source."""
        return self._log.id_types

    @property
    def bad_rows(self) -> dict[tuple[str, int], int]:
        """As in the source."""
        return self._log.bad_rows

    def read(self, start: int, stop: int) -> Batch:
        """Rows start .. stop-1 in the selected columns."""
        rows = self._log.read(start, stop)
        return replace(
            rows,
            dense_BF=rows.dense_BF[:, self._dense],
            onehot_BC=rows.onehot_BC[:, self._one_hot],
            ragged={feature.name: rows.ragged[feature.name] for feature in self.schema.ragged},
            labels_BT=rows.labels_BT[:, self._tasks],
            mask_BT=rows.mask_BT[:, self._tasks],
        )

    def row_at_time(self, time_ms: int) -> int:
        """Position of the first row at or after a time."""
        return self._log.row_at_time(time_ms)

    def time_at_row(self, row: int) -> int:
        """Time of a row."""
        return self._log.time_at_row(row)
