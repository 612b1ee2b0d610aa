"""Inspection of a log before training: rows and label rates per file, duplicates, bad rows, suspected leaks."""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.data.batch import Batch
from ranker.data.hashing import splitmix64
from ranker.data.manifest import FileEntry, Manifest, sha256_of
from ranker.data.parquet_log import ParquetLog
from ranker.data.row_faults import Place
from ranker.data.schema import Schema

_SAMPLE_GROUPS = 8
_ENOUGH = 10  # labels of each kind for such a judgement
SUSPECT = 0.95  # AUC from which a single feature most likely leaks the label
_VANISHED = 0.1  # share of the median rate below which a label counts as vanished


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of an inspection.

    Attributes:
        files: one entry per file with rows, with label rates computed from the rows.
        duplicates: rows that equal another of their row group in all columns except the row id and the lists.
        bad: number of rows that cannot be used.
        warnings: one line each.
    """

    files: tuple[FileEntry, ...]
    duplicates: int
    bad: int
    warnings: tuple[str, ...]


def inspect_log(log: ParquetLog, *, look: Callable[[int, Batch], object] | None = None) -> Findings:
    """Reads a log once, row group by row group, and reports what looks wrong.

    Args:
        log: the log, opened with ``on_bad_rows="drop"`` so that bad rows are counted.
        look: called with the number of each row group and its rows.

    Raises:
        UserError: a file cannot be read.
    """
    sample: list[Batch] = []
    groups: dict[str, list[Batch]] = {}
    entries: list[FileEntry] = []
    duplicates, first_duplicates = 0, ""
    every = max(1, len(log.index.places) // _SAMPLE_GROUPS)
    for number, (place, batch) in enumerate(_groups(log)):
        if place.file not in groups and groups:
            entries.append(_entry(*groups.popitem(), log.schema))
        groups.setdefault(place.file, []).append(_labels_alone(batch))
        repeated = _duplicates(batch)
        if repeated and not duplicates:
            first_duplicates = f"{place.file}, row group {place.row_group}"
        duplicates += repeated
        if number % every == 0:
            sample.append(batch)
        if look is not None:
            look(number, batch)
    entries.append(_entry(*groups.popitem(), log.schema))
    warnings = [*vanished_labels(entries, log.schema), *leak_suspects(sample, log.schema), *missing_days(entries)]
    if duplicates:
        warnings.append(
            f"{duplicates:,} rows equal another in time, ids, numbers and labels, the first in {first_duplicates}: "
            "are they duplicates? Preparing a published log drops them; in a log of your own, drop them yourself"
        )
    if log.num_bad_rows:
        warnings.append(
            f"{log.num_bad_rows:,} rows cannot be used; on_bad_rows=quarantine writes them out with reasons"
        )
    return Findings(files=tuple(entries), duplicates=duplicates, bad=log.num_bad_rows, warnings=tuple(warnings))


def vanished_labels(entries: Sequence[FileEntry], schema: Schema) -> Iterator[str]:
    """Warnings for files in which a binary label is missing, constant or far rarer than usual."""
    for task in schema.tasks:
        if task.type != "binary":
            continue
        rates = {e.path: rate for e in entries if (rate := e.label_rates.get(task.name)) is not None}
        for entry in entries:
            if entry.label_rates.get(task.name) is None and entry.rows:
                yield f"{entry.path}: task '{task.name}' has no observed label"
        usual = statistics.median(rates.values()) if rates else 0.0
        for path, rate in rates.items():
            if rate in (0.0, 1.0):
                what = "positive" if rate == 0.0 else "negative"
                yield f"{path}: task '{task.name}' has no {what} label, so its AUC is undefined there"
            elif rate < _VANISHED * usual:
                yield f"{path}: task '{task.name}' has {rate:.2%} positives where {usual:.2%} is usual"


def missing_days(entries: Sequence[FileEntry]) -> Iterator[str]:
    """Warnings for days (UTC) between the first and the last that no file covers."""
    seen: set[int] = set()
    for entry in entries:
        assert entry.time_min_ms is not None
        assert entry.time_max_ms is not None
        seen |= set(range(entry.time_min_ms // 86_400_000, entry.time_max_ms // 86_400_000 + 1))
    for day in range(min(seen), max(seen)):
        if day not in seen:
            yield f"no rows on {dt.date(1970, 1, 1) + dt.timedelta(days=day)}"


def out_of_order(entries: Sequence[FileEntry]) -> Iterator[str]:
    """Warnings for files whose times overlap. A log cannot be read from them."""
    filled = [entry for entry in entries if entry.time_min_ms is not None and entry.time_max_ms is not None]
    filled.sort(key=lambda entry: (entry.time_min_ms, entry.time_max_ms))
    for before, entry in pairwise(filled):
        if entry.time_min_ms < before.time_max_ms:  # type: ignore[operator]
            yield f"{entry.path} begins before {before.path} ends: sort the rows over all files"


def leak_suspects(sample: Sequence[Batch], schema: Schema) -> Iterator[str]:
    """Warnings for single features that rank a label almost perfectly. They were most likely written after it."""
    for feature, task, auc in single_feature_aucs(Batch.concat(sample), schema):
        if auc >= SUSPECT:
            yield _leak(feature, task, auc)


def single_feature_aucs(rows: Batch, schema: Schema) -> Iterator[tuple[str, str, float]]:
    """How well each feature alone ranks each label: names of feature and task, and an AUC of 0.5 or more.

    Dense features are ranked by value, in the better direction. Ids are ranked by their mean label in one half of the
    rows and scored on the other half. A regression label is positive above its median. Tasks with fewer than ten labels
    of a kind are left out, because a few may agree by chance, and so are lists.
    """
    half = splitmix64(np.arange(len(rows))) % np.uint64(2) == 0  # hashed, because labels may alternate from row to row
    for t, task in enumerate(schema.tasks):
        observed = rows.mask_BT[:, t].numpy()
        labels = rows.labels_BT[:, t].numpy()
        if task.type == "regression":
            labels = labels > np.median(labels[observed]) if observed.any() else labels > 0
        positive = labels > 0
        if min(positive[observed].sum(), (~positive[observed]).sum()) < _ENOUGH:
            continue
        for f, dense in enumerate(schema.dense):
            auc = _auc(rows.dense_BF[observed, f].numpy(), positive[observed])
            yield dense.name, task.name, max(auc, 1 - auc)
        for c, feature in enumerate(schema.one_hot):
            ids = rows.onehot_BC[:, c].numpy()
            known, other = observed & half, observed & ~half
            means = _mean_by_id(ids[known], positive[known])
            yield feature.name, task.name, max(0.5, _auc(means(ids[other]), positive[other]))


def imprecise_columns(footers: Mapping[str, pq.FileMetaData], schema: Schema) -> Iterator[str]:
    """Warnings for dense features of integers above 2^24, whose last bits float32 does not hold."""
    for feature in schema.dense:
        for file, footer in footers.items():
            if footer.schema.to_arrow_schema().get_field_index(feature.column) < 0:  # in the name of a folder
                continue
            largest = _largest_integer(footer, feature.column)
            if largest > 2**24:
                yield (
                    f"{file}: dense feature '{feature.name}' holds integers up to {largest:,}, and float32 is exact "
                    f"up to {2**24:,}: if it is an id, make it categorical; if it is a time, use a difference of times"
                )
                break


def _largest_integer(footer: pq.FileMetaData, name: str) -> int:
    """The largest absolute value of an integer column, by the footer. 0 if it does not tell, or for another type."""
    column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == name)
    if not pa.types.is_integer(footer.schema.to_arrow_schema().field(name).type):
        return 0
    found = (footer.row_group(group).column(column).statistics for group in range(footer.num_row_groups))
    known = [statistics for statistics in found if statistics is not None and statistics.has_min_max]
    return max((max(abs(known_one.min), abs(known_one.max)) for known_one in known), default=0)


def broken_checksums(root: Path, manifest: Manifest) -> Iterator[str]:
    """Warnings for local files whose checksum differs from the manifest."""
    for entry in manifest.files:
        if entry.sha256 and (root / entry.path).is_file() and sha256_of(root / entry.path) != entry.sha256:
            yield f"{entry.path}: the file changed after the manifest was written; prepare the data again"


def _leak(feature: str, task: str, auc: float) -> str:
    return f"feature '{feature}' alone predicts task '{task}' (AUC {auc:.3f}): is it known before the label?"


def _groups(log: ParquetLog) -> Iterator[tuple[Place, Batch]]:
    for group, place in enumerate(log.index.places):
        low, high = (int(log.index.starts[g]) for g in (group, group + 1))
        yield place, log.read(low, high)


def _labels_alone(batch: Batch) -> Batch:
    """The batch without its features, so that those of a long file are not kept in memory."""
    return replace(batch, dense_BF=batch.dense_BF[:, :0], onehot_BC=batch.onehot_BC[:, :0], ragged={})


def _entry(file: str, parts: list[Batch], schema: Schema) -> FileEntry:
    rows = Batch.concat(parts)
    rates: dict[str, float | None] = {}
    for t, task in enumerate(schema.tasks):
        observed = rows.labels_BT[:, t].numpy()[rows.mask_BT[:, t].numpy()]
        rates[task.name] = float(observed.mean(dtype=np.float64)) if len(observed) else None
    return FileEntry(
        path=file,
        rows=len(rows),
        time_min_ms=int(rows.time_ms_B[0]),
        time_max_ms=int(rows.time_ms_B[-1]),
        label_rates=rates,
    )


def _duplicates(batch: Batch) -> int:
    """Number of rows that equal another of the batch, by a 64-bit hash of their columns."""
    columns: list[npt.NDArray[Any]] = [batch.time_ms_B.numpy(), *batch.onehot_BC.numpy().T]
    columns += [column.view(np.int32) for column in np.ascontiguousarray(batch.dense_BF.numpy().T)]
    columns += [column.view(np.int32) for column in np.ascontiguousarray(batch.labels_BT.numpy().T)]
    hashed = np.zeros(len(batch), dtype=np.uint64)
    for column in columns:
        hashed = splitmix64(hashed ^ column.astype(np.int64).view(np.uint64))
    return len(batch) - len(np.unique(hashed))


def _mean_by_id(ids: npt.NDArray[np.int64], positive: npt.NDArray[np.bool_]) -> Any:
    size = int(ids.max(initial=0)) + 1
    counts = np.bincount(ids, minlength=size)
    means = (np.bincount(ids, weights=positive, minlength=size) + positive.mean()) / (counts + 1)
    return lambda others: np.where(others < size, means[np.minimum(others, size - 1)], positive.mean())


def _auc(scores: npt.NDArray[Any], positive: npt.NDArray[np.bool_]) -> float:
    """Probability that a positive scores higher than a negative, ties counting half. 0.5 if one class is missing."""
    count = int(positive.sum())
    if count in (0, len(positive)):
        return 0.5
    _, rank, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    mid = np.cumsum(sizes) - (sizes - 1) / 2
    return float((mid[rank][positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))
