"""The functions that conf/data names to open logs from files: a prepared folder, or a published data set."""

from __future__ import annotations

from collections.abc import Sequence

from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import prepare_cached
from ranker.errors import UserError


def prepared(
    *,
    root: str | None,
    eval_days: int = 1,
    hold_out: str | float | None = None,
    days: Sequence[str] | None = None,
    on_bad_rows: str = "raise",
) -> ParquetLog:
    """Opens a folder of Parquet files with a schema.yaml.

    Args:
        root: the folder.
        eval_days: number of days at the end that are evaluated and not trained on.
        hold_out: hours (``6h``) or a share of the rows (0.1) at the end, in place of eval_days.
        days: first and last day to use, both included. None for all.
        on_bad_rows: ``raise``, ``drop`` or ``quarantine``, see ParquetLog.

    Raises:
        UserError: no folder is given, or it has no log.
    """
    if root is None:
        raise UserError("data=parquet needs data.source=DIR, a folder of Parquet files with a schema.yaml")
    return ParquetLog(root, eval_days=eval_days, hold_out=hold_out, days=days, on_bad_rows=on_bad_rows)


def prepared_from(
    *,
    kind: str,
    source: str | None,
    cache_dir: str,
    eval_days: int = 1,
    hold_out: str | float | None = None,
    days: Sequence[str] | None = None,
    on_bad_rows: str = "raise",
) -> ParquetLog:
    """Opens a published data set. It is prepared into a cache on first use.

    Args:
        kind: ``kuairand`` or ``movielens``.
        source: the folder with the published files.
        cache_dir: folder for prepared data.
        eval_days: number of days at the end that are evaluated and not trained on.
        hold_out: hours (``6h``) or a share of the rows (0.1) at the end, in place of eval_days.
        days: first and last day to use, both included. None for all.
        on_bad_rows: ``raise``, ``drop`` or ``quarantine``, see ParquetLog.

    Raises:
        UserError: no folder is given, or files are missing in it.
    """
    if source is None:
        raise UserError(f"data={kind} needs data.source=DIR, the folder with the published files")
    root = str(prepare_cached(kind, source, cache_dir))
    return ParquetLog(root, eval_days=eval_days, hold_out=hold_out, days=days, on_bad_rows=on_bad_rows)
