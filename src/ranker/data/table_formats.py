"""Folders that belong to a table format, whose files are not all part of the table: Delta, Iceberg, Hudi.

Delta keeps the files of deleted and rewritten rows until they are vacuumed. Reading every file of the folder would
train on rows that are gone, or on two versions of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

from ranker.errors import UserError

DELTA_LOG = "_delta_log/"


def files_of_table(url: str, *, paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """The Parquet files that hold the rows of a table; all of them where the folder is no table.

    Args:
        url: the folder, for errors and for the reader of Delta's log.
        paths: all files in the folder, with forward slashes.
        names: its Parquet files.

    Raises:
        UserError: it is a Delta table whose log cannot be read or whose rows are not simply those of its files, or an
            Iceberg or Hudi table.
    """
    if any(path.startswith(DELTA_LOG) for path in paths):
        return _delta_files(url, names)
    for format_name, found in (
        ("an Iceberg", any(path.startswith("metadata/") and path.endswith(".metadata.json") for path in paths)),
        ("a Hudi", any(path.startswith(".hoodie/") for path in paths)),
    ):
        if found:
            raise UserError(
                f"{url} is {format_name} table, whose folder also holds old versions of its rows; write it as plain "
                'Parquet first, in Spark with spark.table(NAME).write.partitionBy("date").parquet(FOLDER)'
            )
    return list(names)


def _delta_files(url: str, names: Sequence[str]) -> list[str]:
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise UserError(
            f"{url} is a Delta table, whose folder also holds deleted rows: pip install deltalake, which reads its log"
        ) from error
    try:
        table = DeltaTable(url)
        uris = table.file_uris()
        deleted = sum(batch.num_rows for batch in table.deletion_vectors())
        mapped = table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none"
    except (DeltaError, OSError, ValueError) as error:
        raise UserError(f"{url}: the log of the Delta table cannot be read: {' '.join(str(error).split())}") from error
    if deleted:
        raise UserError(
            f"{url}: {deleted:,} files of the Delta table have deletion vectors, which are not read here; apply them "
            f"with REORG TABLE delta.`{url}` APPLY (PURGE)"
        )
    if mapped:
        raise UserError(
            f"{url}: the Delta table maps its columns to other names in its files; write it as plain Parquet first"
        )
    # Names may repeat in folders, as in a converted table. A path's beginning is the table's and is written otherwise.
    by_name: dict[str, list[str]] = {}
    for name in names:
        by_name.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    kept = set()
    for uri in uris:
        last = uri.rsplit("/", 1)[-1]
        found = [name for name in by_name.get(last, ()) if f"/{uri}".endswith(f"/{name}")]
        if not found:
            raise UserError(f"{url}: {last} is in the log of the Delta table but not in its folder; restore the table")
        kept.add(max(found, key=len))
    return [name for name in names if name in kept]
