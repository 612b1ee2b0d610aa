"""Where conf/data points: each function opens one kind of log."""

from __future__ import annotations

from ranker.data.parquet_log import ParquetLog
from ranker.data.prepare import prepare_cached
from ranker.errors import UserError


def prepared(*, root: str | None, eval_days: int = 1) -> ParquetLog:
    """A folder of Parquet files with a schema.yaml.

    Args:
        root: the folder.
        eval_days: the last days, which are evaluated and not trained on.

    Raises:
        UserError: no folder was named, or it does not hold a log.
    """
    if root is None:
        raise UserError("data=parquet needs data.root=DIR, a folder of Parquet files with a schema.yaml")
    return ParquetLog(root, eval_days=eval_days)


def prepared_from(*, kind: str, source: str | None, cache_dir: str, eval_days: int = 1) -> ParquetLog:
    """A public data set in its published files, prepared into a cache on first use.

    Args:
        kind: ``kuairand`` or ``movielens``.
        source: the folder with the published files.
        cache_dir: where prepared data are kept.
        eval_days: the last days, which are evaluated and not trained on.

    Raises:
        UserError: no folder was named, or files are missing in it.
    """
    if source is None:
        raise UserError(f"data={kind} needs data.source=DIR, the folder with the published files")
    return ParquetLog(str(prepare_cached(kind, source, cache_dir)), eval_days=eval_days)
