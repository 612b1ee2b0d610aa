"""The profile of a log: its features with nulls, distinct values and drift, label rates by day, single-feature AUCs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ranker.data.batch import Batch
from ranker.data.column_profile import ColumnProfile
from ranker.data.decode import decode
from ranker.data.inspection import single_feature_aucs
from ranker.data.parquet_log import ParquetLog
from ranker.data.row_faults import Place, bad_rows, drop_rows
from ranker.data.schema import CategoricalFeature, DenseFeature
from ranker.data.sketches import RowSample
from ranker.data.times import DAY_MS

PERIODS = 31  # at most; of a longer log several days are one period
SAMPLE = 2048  # rows of each period
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
BINS = 10  # of a number, for drift
VALUES = 20  # of ids, for drift: the most frequent ones; the others count together
ENOUGH = 100  # sampled rows of a period for a drift

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FeatureProfile:
    """One feature.

    Attributes:
        feature: from the schema.
        column: summary of its column over all rows.
        nulls_P: share of nulls by period; nan for a period without rows.
        drift_P: by period, the population stability index against all other periods; nan where too few rows are known.
        values: sampled numbers of a dense feature, or lengths of lists, ascending; empty for ids.
        aucs: by task, the AUC of this feature alone on the sample.
    """

    feature: DenseFeature | CategoricalFeature
    column: ColumnProfile
    nulls_P: Floats
    drift_P: Floats
    values: Floats
    aucs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LogProfile:
    """A whole log.

    Attributes:
        rows: number of rows.
        days: days of a period.
        starts: the first day of each period, ``YYYY-MM-DD`` (UTC).
        rows_P: rows by period.
        labels: by task, the mean observed label by period; nan where none is observed.
        observed: by task, the share of rows with a label.
        features: in the order of the schema.
        sampled: rows of the sample behind drift, quantiles and AUCs.
    """

    rows: int
    days: int
    starts: Sequence[str]
    rows_P: Floats
    labels: Mapping[str, Floats]
    observed: Mapping[str, float]
    features: Sequence[FeatureProfile]
    sampled: int


class LogProfiler:
    """Collects a profile row group by row group, in memory that does not grow with the log.

    Args:
        log: the log, opened with ``on_bad_rows="drop"``.
    """

    def __init__(self, log: ParquetLog) -> None:
        self._log, schema = log, log.schema
        first, last = (int(log.index.time_min_ms[0]) // DAY_MS, int(log.index.time_max_ms[-1]) // DAY_MS)
        self._first = first
        self._days = -(-(last - first + 1) // PERIODS)
        periods = (last - first) // self._days + 1
        self._columns = {name: ColumnProfile(name) for name in schema.feature_columns()}
        self._rows_P = np.zeros(periods)
        self._nulls_PC = np.zeros((periods, len(self._columns)))
        self._sums_PT = np.zeros((periods, len(schema.tasks)))
        self._counts_PT = np.zeros((periods, len(schema.tasks)))
        self._samples = [RowSample(SAMPLE) for _ in range(periods)]

    def add(self, group: int, batch: Batch) -> None:
        """Adds the rows of a row group: as stored, and as they were decoded."""
        table = self._log.index.read(group, self._log.schema.columns())
        first_row = int(self._log.index.starts[group])
        period_B = (batch.time_ms_B.numpy() // DAY_MS - self._first) // self._days
        labels, mask = batch.labels_BT.numpy().astype(np.float64), batch.mask_BT.numpy()
        for column in self._columns.values():
            column.add(table[column.name])
        edges = np.searchsorted(period_B, np.arange(len(self._rows_P) + 1))  # rows are in time order
        for period in np.unique(period_B).tolist():
            low, high = int(edges[period]), int(edges[period + 1])
            part = table.slice(low, high - low)
            self._rows_P[period] += high - low
            self._nulls_PC[period] += [_missing(part[name]) for name in self._columns]
            self._sums_PT[period] += (labels[low:high] * mask[low:high]).sum(axis=0)
            self._counts_PT[period] += mask[low:high].sum(axis=0)
            self._samples[period].add(part, np.arange(first_row + low, first_row + high))

    def profile(self) -> LogProfile:
        """The profile of the rows so far."""
        schema = self._log.schema
        tables = [sample.table() for sample in self._samples]
        sizes = [0 if table is None else table.num_rows for table in tables]
        known = [table for table in tables if table is not None]
        sample = pa.concat_tables(known, promote_options="permissive").combine_chunks()
        period_S = np.repeat(np.arange(len(sizes)), sizes)
        aucs: dict[str, dict[str, float]] = {name: {} for name in schema.feature_names}
        for name, task_name, auc in single_feature_aucs(_decoded(sample, self._log), schema):
            aucs[name][task_name] = auc
        with np.errstate(invalid="ignore", divide="ignore"):
            nulls_PC = self._nulls_PC / self._rows_P[:, None]
            means_PT = self._sums_PT / self._counts_PT
        known_T = self._counts_PT.sum(axis=0) / self._rows_P.sum()
        places = {name: place for place, name in enumerate(self._columns)}
        features = []
        every: list[DenseFeature | CategoricalFeature] = [*schema.dense, *schema.categorical]
        for feature in every:
            column = sample[feature.column]
            numbers, codes = _numbers(column, feature), _codes(column, feature)
            features.append(
                FeatureProfile(
                    feature=feature,
                    column=self._columns[feature.column],
                    nulls_P=nulls_PC[:, places[feature.column]],
                    drift_P=drift(codes, period_S, len(sizes)),
                    values=np.sort(numbers[np.isfinite(numbers)]),
                    aucs=aucs[feature.name],
                )
            )
        day = dt.date(1970, 1, 1) + dt.timedelta(days=self._first)
        return LogProfile(
            rows=int(self._rows_P.sum()),
            days=self._days,
            starts=[(day + dt.timedelta(days=p * self._days)).isoformat() for p in range(len(sizes))],
            rows_P=self._rows_P,
            labels={task.name: means_PT[:, t] for t, task in enumerate(schema.tasks)},
            observed={task.name: float(known_T[t]) for t, task in enumerate(schema.tasks)},
            features=features,
            sampled=sum(sizes),
        )


def drift(codes_S: npt.NDArray[np.int64], period_S: npt.NDArray[np.int64], periods: int) -> Floats:
    """How far each period is from the others together: the population stability index, without what chance adds.

        PSI = sum_b (p_b - q_b) log(p_b / q_b)       p: share of bin b in the period, q: in all others
        drift = max(0, PSI - (B - 1) (1 / n + 1 / m))      B bins, n rows of the period, m of the others

    The second term is the expectation of PSI where nothing differs. Half a row is added to each bin, so that none is
    empty. Below 0.1 a period is usually called stable, above 0.25 shifted.

    Args:
        codes_S: bin of each sampled row.
        period_S: its period.
        periods: number of periods.

    Source: Yurdakul and Naranjo, "Statistical properties of the population stability index", 2020.
    """
    bins = int(codes_S.max(initial=0)) + 1
    counts_PB = np.zeros((periods, bins))
    np.add.at(counts_PB, (period_S, codes_S), 1.0)
    found = np.full(periods, np.nan)
    total_B = counts_PB.sum(axis=0)
    for period, mine in enumerate(counts_PB):
        others = total_B - mine
        n, m = mine.sum(), others.sum()
        if min(n, m) < ENOUGH:
            continue
        used = (mine + others) > 0
        p, q = ((x[used] + 0.5) / (x[used] + 0.5).sum() for x in (mine, others))
        chance = (used.sum() - 1) * (1 / n + 1 / m)
        found[period] = max(0.0, float(((p - q) * np.log(p / q)).sum() - chance))
    return found


def _decoded(sample: pa.Table, log: ParquetLog) -> Batch:
    """The sample as a model sees it, without bad rows."""
    batch, faults = decode(sample, schema=log.schema, first_row=0, place=Place(file="the sample", row_group=0))
    return drop_rows(batch, bad_rows(faults)) if faults else batch


def _missing(column: pa.ChunkedArray) -> int:
    nans = pc.sum(pc.is_nan(column)).as_py() or 0 if pa.types.is_floating(column.type) else 0
    return int(column.null_count + nans)


def _numbers(column: pa.ChunkedArray, feature: DenseFeature | CategoricalFeature) -> Floats:
    """Numbers of a dense feature as stored, or the lengths of lists; nan where unknown. Empty for ids."""
    if isinstance(feature, CategoricalFeature) and feature.kind == "one_hot":
        return np.empty(0)
    if isinstance(feature, CategoricalFeature):
        column = pa.chunked_array([pc.list_value_length(chunk).cast(pa.int64()) for chunk in column.chunks], pa.int64())
    values = pl.Series(pl.from_arrow(column)).cast(pl.Float64)
    return values.fill_null(np.nan).to_numpy()


def _codes(column: pa.ChunkedArray, feature: DenseFeature | CategoricalFeature) -> npt.NDArray[np.int64]:
    """A bin for each row: 0 for null, then tenths of a number, or the most frequent ids and the others."""
    numbers = _numbers(column, feature)
    if len(numbers):
        finite = np.isfinite(numbers)
        known = numbers[finite] if finite.any() else np.zeros(1)
        edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]))
        return np.where(finite, 1 + np.searchsorted(edges, numbers, side="left"), 0).astype(np.int64)
    values = pl.Series("value", pl.from_arrow(column))
    values = values.cast(pl.String) if values.dtype == pl.Categorical else values
    head = values.drop_nulls().value_counts(sort=True, name="count").head(VALUES)["value"]
    places = pl.DataFrame({"value": head, "code": np.arange(2, 2 + len(head))})
    joined = pl.DataFrame({"value": values}).join(places, on="value", how="left", maintain_order="left")
    codes = pl.when(pl.col("value").is_null()).then(0).otherwise(pl.col("code").fill_null(1))
    return joined.select(codes.cast(pl.Int64).alias("code"))["code"].to_numpy()
