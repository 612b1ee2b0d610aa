"""The generated log as files: one Parquet file per UTC day, a schema and a manifest, of any number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa

from ranker.atomic import locked, replacing_folder
from ranker.data.manifest import Manifest
from ranker.data.prepare.days import ROW_GROUP, DayFiles, Step
from ranker.data.schema import SCHEMA_FILE
from ranker.data.synthetic import BLOCK, SyntheticLog
from ranker.errors import UserError


def write_generated(
    log: SyntheticLog, destination: str | Path, *, settings: Sequence[str] = (), step: Step
) -> Manifest:
    """Writes all rows of a generated log, training days and hold-out. Memory does not grow with it.

    The files hold the raw columns. Read as ``data=parquet`` they give the features, labels and times of the log itself,
    but for the embedding rows of hashed ids: files are hashed as any log, the generated ids are spread by remainder.

    Args:
        log: the generated log. One with row weights is refused: its weights are not columns of the world.
        destination: folder to create.
        settings: the words that made the log, for the manifest.
        step: progress bar, as of :func:`ranker.data.prepare.days.write_days`.

    Raises:
        UserError: the log has row weights, or the destination is not empty.
    """
    if log.schema.weight:
        raise UserError("a generated log with row weights cannot be written: leave out data.log.row_weights")
    target = Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; name a new folder")
    with locked(target), replacing_folder(target) as draft:
        with step("generating rows", log.num_rows) as advance, DayFiles(draft, log.schema) as files:
            held: list[pl.DataFrame] = []
            for frame in raw_frames(log):
                held.append(frame)
                if len(held) * BLOCK >= ROW_GROUP:
                    files.add(pl.concat(held))
                    held.clear()
                advance(len(frame))
            if held:
                files.add(pl.concat(held))
        log.schema.to_yaml(draft / SCHEMA_FILE)
        manifest = Manifest(files=tuple(files.entries), source={"kind": "synthetic", "settings": list(settings)})
        manifest.write(draft)
    return manifest


def raw_frames(log: SyntheticLog) -> Iterator[pl.DataFrame]:
    """The rows in order, in pieces of at most one block."""
    start = 0
    while start < log.num_rows:
        times, block = log.raw(start)
        start += len(times)
        columns: dict[str, pl.Series] = {"time_ms": pl.Series(times)}
        columns |= {name: pl.Series(values) for name, values in block.one_hot.items()}
        columns |= {name: pl.Series(values) for name, values in (block.dense | block.labels).items()}
        columns["rating_observed"] = pl.Series(block.rating_observed)
        for name, (values, offsets) in block.ragged.items():
            columns[name] = pl.Series(name, pa.LargeListArray.from_arrays(offsets, values))
        yield pl.DataFrame(columns).select(log.schema.columns())
