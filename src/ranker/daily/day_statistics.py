"""What a day's rows look like: scale, quantiles and nulls of dense features, label rates, ids. Kept as a small file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ranker.atomic import replacing, write_text
from ranker.daily.days import Files
from ranker.data.batch import Batch
from ranker.data.loader import EvalLoader
from ranker.data.log import Log, Selected
from ranker.data.parquet_log import ParquetLog
from ranker.data.schema import DenseFeature, Schema

FORMAT = 1
_QUANTILES = np.linspace(0.0, 1.0, 101)
_BLOCK = 4096
_QUARTER_MS = 21_600_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DenseDay:
    """A dense feature over a day, in the unit of ``scale * x``: a transform is undone.

    Attributes:
        scales: median of the absolute values that are not 0, by quarter of the day (UTC); without those quarters that
            have none.
        quantiles: 101 of them, from the smallest value to the largest.
        nulls: share of nulls; None if the files do not say.
    """

    scales: Sequence[float]
    quantiles: Sequence[float]
    nulls: float | None


@dataclass(frozen=True, kw_only=True)
class DayStatistics:
    """What a day's rows look like, from a sample of them.

    Attributes:
        rows: rows of the day.
        sampled: rows that were looked at.
        dense: by feature.
        labels: by task, number of observed labels and their mean, of the transformed label.
        seen: by embedding table, which rows occur; bool [rows].
        ids: by one-hot feature, how often each of its rows occurs, as two arrays: rows and counts.
        files: of the day.
        schema: checksum of the schema by which the values were read.
    """

    rows: int
    sampled: int
    dense: dict[str, DenseDay]
    labels: dict[str, tuple[int, float | None]]
    seen: dict[str, npt.NDArray[np.bool_]]
    ids: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    files: dict[str, str]
    schema: str

    @classmethod
    def of(cls, log: Log, start: int, stop: int, *, sample_rows: int, files: Files) -> DayStatistics:
        """Reads a sample of rows start .. stop - 1, whole blocks of 4096 spread evenly."""
        schema = log.schema
        loader = EvalLoader(log, start=start, stop=stop, batch_size=_BLOCK, max_rows=sample_rows, num_workers=0)
        batches = list(loader)
        rows = Batch.concat(batches) if len(batches) > 1 else batches[0]
        counted_B = rows.mask_BT.numpy().any(axis=1)  # others are left out of training too
        values_BF = rows.dense_BF.numpy().astype(np.float64)[counted_B]
        quarter_B = (rows.time_ms_B.numpy()[counted_B] // _QUARTER_MS) % 4
        nulls = _nulls(log, schema.dense, files)
        dense = {f.name: _dense(values_BF[:, i], f, quarter_B, nulls.get(f.name)) for i, f in enumerate(schema.dense)}
        labels: dict[str, tuple[int, float | None]] = {}
        for t, task in enumerate(schema.tasks):
            observed = rows.labels_BT[:, t].numpy()[rows.mask_BT[:, t].numpy()]
            labels[task.name] = len(observed), float(observed.mean(dtype=np.float64)) if len(observed) else None
        seen, ids = _ids(rows, schema)
        return cls(
            rows=stop - start,
            sampled=len(rows),
            dense=dense,
            labels=labels,
            seen=seen,
            ids=ids,
            files=dict(files),
            schema=digest_of(schema),
        )

    def save(self, folder: Path, day: str) -> None:
        """Writes DAY.json and DAY.npz. The first is written last: where it is, the other one is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"seen/{name}": np.packbits(bits) for name, bits in self.seen.items()}
        for name, (rows, counts) in self.ids.items():
            arrays |= {f"rows/{name}": rows, f"counts/{name}": counts}
        with replacing(folder / f"{day}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        plain = {
            "format": FORMAT,
            "rows": self.rows,
            "sampled": self.sampled,
            "dense": {name: asdict(x) for name, x in self.dense.items()},
            "labels": self.labels,
            "tables": {name: len(bits) for name, bits in self.seen.items()},
            "files": self.files,
            "schema": self.schema,
        }
        write_text(folder / f"{day}.json", json.dumps(plain) + "\n")

    @classmethod
    def read(cls, folder: Path, day: str) -> DayStatistics | None:
        """What ``save`` wrote; None where it is missing or cannot be read, as it can be made again."""
        try:
            plain = json.loads((folder / f"{day}.json").read_text(encoding="utf-8"))
            if plain["format"] != FORMAT:
                return None
            with np.load(folder / f"{day}.npz") as arrays:
                seen = {
                    name: np.unpackbits(arrays[f"seen/{name}"], count=size).astype(bool)
                    for name, size in plain["tables"].items()
                }
                names = [key.removeprefix("rows/") for key in arrays if key.startswith("rows/")]
                ids = {name: (arrays[f"rows/{name}"], arrays[f"counts/{name}"]) for name in names}
        except Exception:  # whatever numpy and zipfile raise for a damaged file
            return None
        return cls(
            rows=plain["rows"],
            sampled=plain["sampled"],
            dense={name: DenseDay(**x) for name, x in plain["dense"].items()},
            labels={name: (count, mean) for name, (count, mean) in plain["labels"].items()},
            seen=seen,
            ids=ids,
            files=plain["files"],
            schema=plain.get("schema", ""),  # missing in older files
        )


def digest_of(schema: Schema) -> str:
    """Checksum of all that decides how values are read."""
    return hashlib.sha256(json.dumps(schema.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _dense(values_B: Floats, feature: DenseFeature, quarter_B: npt.NDArray[np.int64], nulls: float | None) -> DenseDay:
    if feature.transform == "log1p":
        values_B = np.sign(values_B) * np.expm1(np.abs(values_B))
    sizes_B = np.abs(values_B)
    scales = []
    for quarter in range(4):
        there = sizes_B[(quarter_B == quarter) & (sizes_B > 0)]
        if len(there):
            scales.append(float(np.median(there)))
    quantiles = np.quantile(values_B, _QUANTILES) if len(values_B) else np.zeros(0)
    return DenseDay(scales=scales, quantiles=quantiles.tolist(), nulls=nulls)


def _nulls(log: Log, features: Sequence[DenseFeature], files: Files) -> dict[str, float]:
    """Share of nulls by feature, from the statistics in the footers of the day's files."""
    source = log.source if isinstance(log, Selected) else log
    if not isinstance(source, ParquetLog):
        return {}
    found: dict[str, float] = {}
    for feature in features:
        nulls = rows = 0
        known = True
        for file in files:
            footer = source.index.metadata[file]
            leaves = [i for i in range(footer.num_columns) if footer.schema.column(i).path == feature.column]
            for group in range(footer.num_row_groups if leaves else 0):
                statistics = footer.row_group(group).column(leaves[0]).statistics
                known &= statistics is not None and statistics.has_null_count
                nulls += statistics.null_count if statistics is not None else 0
                rows += footer.row_group(group).num_rows
        if known and rows:
            found[feature.name] = nulls / rows
    return found


def _ids(rows: Batch, schema: Schema) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which rows of each table occur, and how often each row occurs in each one-hot feature."""
    seen = {f.name: np.zeros(f.rows, dtype=bool) for f in schema.categorical if not f.table}
    ids: dict[str, Any] = {}
    for column, feature in enumerate(schema.one_hot):
        found, counts = np.unique(rows.onehot_BC[:, column].numpy(), return_counts=True)
        seen[schema.table_of(feature).name][found] = True
        ids[feature.name] = found, counts
    for feature in schema.ragged:
        seen[schema.table_of(feature).name][np.unique(rows.ragged[feature.name].values.numpy())] = True
    return seen, ids
